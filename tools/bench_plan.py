"""How little the plan pads, and what it costs for a large set.

Takes the depths of the Clog Loss challenge's clips, and measures the share of true
frames among the padded ones, in the plan's bands and in random order. Then a fresh process sorts
many clips in memory and takes steps. benchmarks/plan.md explains the results.

    python tools/bench_plan.py [--depths FILE] [--clips N] [--quick] [--json FILE]
"""

from __future__ import annotations

import csv
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import add_goals, finish, memory, new_table, options, say, seconds, versions
from rich.table import Table

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_order import by_depth
from dist_train.data.plan.plan import Plan, make_plan, plan_of
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import Floats
from dist_train.data.synthetic.challenge_stats import CLIPS_BY_DEPTH

POSITIVES = 1_887
#: Clips of a rank at a step, and positives to negatives.
RANK_BATCH, RATIO = 4, ClassRatio((1, 3))
#: Results are means over these epochs (by ranks) and seeds: three digits are stable.
EPOCHS, SEEDS = {8: 2, 64: 8, 512: 24}, 3
RANKS, FAR_STEP = 1_024, 10**6
#: Timed steps.
STEPS = 200


def main() -> None:
    parser = options(__doc__, "leave the large set out")
    parser.add_argument(
        "--depths",
        type=Path,
        help="CSV of clips by num_frames, with the columns all and micro_stalled; without it both "
        "classes have the depths of all clips of the challenge",
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=10**7,
        help="clips of the large set, a million or more (75 bytes each)",
    )
    arguments = parser.parse_args()
    clips = read_clips(arguments.depths) if arguments.depths else challenge_clips()
    result = measure(clips, large=0 if arguments.quick else arguments.clips)
    finish(arguments.json, result, as_table(result))


def measure(clips: Clips, *, large: int) -> dict[str, Any]:
    summary: dict[str, float] = {}
    for ranks in (8, 64, 512):
        say(f"{ranks} ranks x {RANK_BATCH}")
        summary |= padding(clips, ranks)
    if large:
        say(f"{large} clips")
        # A process of its own, whose peak memory is that of the set alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            summary |= fresh.submit(at_scale, clips, large).result()
    return {
        "summary": summary,
        "clips": {"positives": len(clips.positives), "negatives": len(clips.negatives)},
        "means_of": {"epochs_by_ranks": EPOCHS, "seeds": SEEDS},
        "versions": versions("numpy"),
    }


# --- the clips ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """Depths of all positives and of all negatives in frames, ascending, int64."""

    positives: Ints
    negatives: Ints


def challenge_clips() -> Clips:
    """Depths of all clips of the challenge; each depth has the same share of positives."""
    depths, counts = (
        np.array(list(column)) for column in zip(*CLIPS_BY_DEPTH.items(), strict=True)
    )
    positives = spread(counts, POSITIVES)
    return Clips(np.repeat(depths, positives), np.repeat(depths, counts - positives))


def read_clips(path: Path) -> Clips:
    """The challenge's clips: 1,887 positives, whose depths are distributed as those of the stalled
    clips of its labelled subset, and all others."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    depths = np.array([int(row["num_frames"]) for row in rows])
    everything = np.array([int(row["all"]) for row in rows])
    stalled = np.array([int(row["micro_stalled"]) for row in rows])
    positives = spread(stalled, POSITIVES)
    # The subset, scaled up, may have more clips of a rare depth than there are.
    negatives = np.maximum(everything - positives, 0)
    return Clips(np.repeat(depths, positives), np.repeat(depths, negatives))


def spread(counts: Ints, total: int) -> Ints:
    """``total`` cut in proportion to ``counts``. Running sums are rounded, so errors do not add."""
    ends = np.rint(np.cumsum(counts) / counts.sum() * total).astype(np.int64)
    parts: Ints = np.diff(ends, prepend=0)
    return parts


def plan_for(clips: Clips, ranks: int, seed: int) -> Plan:
    return make_plan(
        np.arange(len(clips.positives)),
        len(clips.positives) + np.arange(len(clips.negatives)),
        batch=ranks * RANK_BATCH,
        ratio=RATIO,
        seed=seed,
        positive_depths=clips.positives,
        negative_depths=clips.negatives,
    )


# --- padding --------------------------------------------------------------------------------------


def padding(clips: Clips, ranks: int) -> dict[str, float]:
    """True frames over padded frames, with every clip of a step padded to the deepest of all ranks:
    means over steps.

    "but_deepest" leaves out the deepest step of each epoch. "sorted" sorts the positives, cuts
    steps from the shallow end and drops the rest.
    """
    plans = [plan_for(clips, ranks, seed) for seed in range(SEEDS)]
    epochs = [of_epoch for plan in plans for of_epoch in efficiencies(plan, EPOCHS[ranks])]
    sorted_steps = clips.positives[: POSITIVES // ranks * ranks].reshape(-1, ranks)
    case = f"{ranks}x{RANK_BATCH}"
    return {
        f"efficiency_{case}": float(np.concatenate(epochs).mean()),
        f"efficiency_{case}_but_deepest": float(np.concatenate([e[:-1] for e in epochs]).mean()),
        f"sorted_{case}_but_deepest": float((sorted_steps.mean(1) / sorted_steps.max(1)).mean()),
        f"bound_{case}": bound(clips.positives, ranks),
        f"random_{case}": random_efficiency(clips, ranks),
    }


def efficiencies(plan: Plan, epochs: int) -> list[Floats]:
    """Efficiencies of the steps of each epoch, in order of the steps' greatest depth."""
    found = []
    for epoch in range(epochs):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        depths = sorted((plan.depths(step) for step in steps), key=np.max)
        found.append(np.array([of_step.mean() / of_step.max() for of_step in depths]))
    return found


def bound(positives: Ints, ranks: int) -> float:
    """Upper bound of any plan that takes each positive once and negatives of the same depths.

    One step holds the deepest positive; its mean depth is at most that of the deepest positives
    that fill a step. The bound gives all other steps an efficiency of 1.
    """
    steps = len(positives) / ranks
    deepest = positives[-ranks:].mean() / positives[-1]
    return float((deepest + steps - 1) / steps)


def random_efficiency(clips: Clips, ranks: int) -> float:
    """Efficiency of random order: of a plan that knows no depths."""
    depths = np.concatenate([clips.positives, clips.negatives])
    numbers = np.arange(len(depths))
    positives, negatives = np.split(numbers, [len(clips.positives)])
    plan = make_plan(positives, negatives, batch=ranks * RANK_BATCH, ratio=RATIO, seed=0)
    steps = [depths[plan.global_batch(step)] for step in range(STEPS)]
    return float(np.mean([of_step.mean() / of_step.max() for of_step in steps]))


# --- a large set ----------------------------------------------------------------------------------


def at_scale(clips: Clips, count: int) -> dict[str, float]:
    """Sort ``count`` clips of the same depths and share of positives, and take steps of ``RANKS``
    ranks."""
    rng = np.random.default_rng(0)
    is_positive = rng.random(count, np.float32) < POSITIVES / 573_048
    depths = rng.choice(np.concatenate([clips.positives, clips.negatives]).astype(np.int16), count)
    positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)

    def milliseconds(plan: Plan, step: int) -> float:
        take = partial(plan.rank_batches, step, rank=RANKS // 2, world=RANKS, accumulate=1)
        return 1e3 * seconds(take)

    began = time.perf_counter()
    anchor, other = (by_depth(clips, depths[clips]) for clips in (positives, negatives))

    def new_plan() -> Plan:
        plan = plan_of(anchor, [other], PlanRules(RANKS * RANK_BATCH, RATIO, seed=0))
        assert len(plan.fingerprint) == 16
        return plan

    plan = new_plan()
    found = {"large_clips": float(count), "build_s": time.perf_counter() - began}
    found["step_ms"] = float(np.median([milliseconds(plan, step) for step in range(STEPS)]))
    # The first step of a new plan also draws for its epoch.
    for name, step in (("1", 1), ("1e6", FAR_STEP)):
        resumed = [milliseconds(new_plan(), step) for _ in range(5)]
        found[f"resume_ms_step_{name}"] = float(np.median(resumed))
    return {**found, "rss_mb": memory("VmHWM") / 1e6}


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    summary = result["summary"]
    table = new_table(
        "{negatives} negatives, {positives} positives".format(**result["clips"]),
        *("", "8 x 4", "64 x 4", "512 x 4", "goal"),
    )
    for label, name, goal in (
        ("true frames / padded frames", "efficiency_{}", ">= .985, .96, .86"),
        ("  upper bound, if no positive is dropped", "bound_{}", ""),
        ("  in random order", "random_{}", ""),
        ("  without each epoch's deepest step", "efficiency_{}_but_deepest", ""),
        ("  the same, perfectly sorted", "sorted_{}_but_deepest", ""),
    ):
        ratios = [summary[name.format(f"{ranks}x{RANK_BATCH}")] for ranks in EPOCHS]
        table.add_row(label, *(f"{ratio:.4f}" for ratio in ratios), goal)
    if "build_s" in summary:
        table.add_section()
        add_goals(
            table,
            summary,
            ("a large set: clips", "large_clips", "{:.1e}", ""),
            ("  sort", "build_s", "{:.1f} s", ""),
            ("  peak memory", "rss_mb", "{:.0f} MB", ""),
            (f"  a step of {RANKS} x {RANK_BATCH}", "step_ms", "{:.2f} ms", "< 2 ms"),
            ("  first step of a run", "resume_ms_step_1", "{:.1f} ms", ""),
            ("  first step after a resume at 10^6", "resume_ms_step_1e6", "{:.1f} ms", "the same"),
        )
    return table


if __name__ == "__main__":
    main()
