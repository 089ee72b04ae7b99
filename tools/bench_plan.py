"""How little the plan pads, and what it costs for a large set.

Takes the depths of the Clog Loss challenge's clips from a table, and measures how many of the
padded frames are true ones, in the plan's bands and in random order. Then a fresh process sorts
many clips in memory and takes steps. benchmarks/plan.md says how to read the figures.

    python tools/bench_plan.py --depths FILE [--clips N] [--json FILE]
"""

from __future__ import annotations

import csv
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import finish, memory, options, say
from rich.table import Table

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_order import ByDepth, by_depth
from dist_train.data.plan.plan import Plan, make_plan, plan_of
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import Floats

POSITIVES = 1_887
#: The clips of a rank at a step, 1 to 3.
RANK_BATCH, RATIO = 4, ClassRatio(1, 3)
#: Epochs and seeds that the figures are means of: enough that none moves in its third digit.
EPOCHS, SEEDS = {8: 2, 64: 8, 512: 24}, 3
RANKS, FAR_STEP = 1_024, 10**6
#: Steps that are timed, one after the other.
STEPS = 200


def main() -> None:
    parser = options(__doc__, "leave the large set out")
    parser.add_argument(
        "--depths",
        type=Path,
        required=True,
        help="CSV of clips by num_frames, with the columns all and micro_stalled",
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=10**7,
        help="of the large set, which --quick leaves out: a million or more (75 bytes each)",
    )
    arguments = parser.parse_args()
    clips = read_clips(arguments.depths)
    result = measure(clips, large=0 if arguments.quick else arguments.clips)
    finish(arguments.json, result, as_table(result))


def measure(clips: Clips, *, large: int) -> dict[str, Any]:
    summary: dict[str, float] = {}
    for ranks in (8, 64, 512):
        say(f"{ranks} ranks x {RANK_BATCH}")
        summary |= padding(clips, ranks)
    if large:
        say(f"{large} clips")
        # Its peak of memory is of nothing else.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            summary |= fresh.submit(at_scale, clips, large).result()
    return {
        "summary": summary,
        "clips": {"positives": len(clips.positives), "negatives": len(clips.negatives)},
        "means_of": {"epochs_by_ranks": EPOCHS, "seeds": SEEDS},
        "versions": {"numpy": np.__version__},
    }


# --- the clips ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """Depths of all positives and of all negatives, in frames, ascending: int64."""

    positives: Ints
    negatives: Ints


def read_clips(path: Path) -> Clips:
    """The challenge's clips: 1,887 positives with the depths of the stalled clips of its labelled
    subset, and the others."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    depths = np.array([int(row["num_frames"]) for row in rows])
    everything = np.array([int(row["all"]) for row in rows])
    stalled = np.array([int(row["micro_stalled"]) for row in rows])
    positives = spread(stalled, POSITIVES)
    # Where the subset, scaled up, has more of a rare depth than there are clips, no negative is.
    negatives = np.maximum(everything - positives, 0)
    return Clips(np.repeat(depths, positives), np.repeat(depths, negatives))


def spread(counts: Ints, total: int) -> Ints:
    """``total`` in proportion to ``counts``: running sums are rounded, so none is far off."""
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
    """True frames over padded ones, with every clip of a step padded to the deepest of all ranks:
    means over steps.

    "but_deepest" leaves out the deepest step of each epoch, as does whoever sorts the positives,
    cuts them from the shallow end and drops what does not fill a step; "sorted" is that one.
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
    """Of the steps of each epoch, in order of their greatest depth."""
    found = []
    for epoch in range(epochs):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        depths = sorted((plan.depths(step) for step in steps), key=np.max)
        found.append(np.array([of_step.mean() / of_step.max() for of_step in depths]))
    return found


def bound(positives: Ints, ranks: int) -> float:
    """What no plan can exceed in which each positive comes once a pass and the negatives of a step
    have the depths of its positives.

    One step of each pass holds the deepest positive. Its mean is at most that of the deepest ones
    that fill a step. The other steps are given an efficiency of 1.
    """
    steps = len(positives) / ranks
    deepest = positives[-ranks:].mean() / positives[-1]
    return float((deepest + steps - 1) / steps)


def random_efficiency(clips: Clips, ranks: int) -> float:
    """The same for random order: the plan that is told no depths."""
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

    began = time.perf_counter()
    classes = (
        by_depth(positives, depths[positives]),
        by_depth(negatives, depths[negatives]),
    )
    plan = open_plan(*classes)
    found = {"large_clips": float(count), "build_s": time.perf_counter() - began}

    def milliseconds(plan: Plan, step: int) -> float:
        began = time.perf_counter()
        plan.rank_batches(step, rank=RANKS // 2, world=RANKS, accumulate=1)
        return (time.perf_counter() - began) * 1e3

    found["step_ms"] = float(np.median([milliseconds(plan, step) for step in range(STEPS)]))
    # The first step of a new plan also works out what its epoch draws.
    for name, step in (("1", 1), ("1e6", FAR_STEP)):
        resumed = [milliseconds(open_plan(*classes), step) for _ in range(5)]
        found[f"resume_ms_step_{name}"] = float(np.median(resumed))
    return {**found, "rss_mb": memory("VmHWM") / 1e6}


def open_plan(positives: ByDepth, negatives: ByDepth) -> Plan:
    plan = plan_of(positives, negatives, PlanRules(RANKS * RANK_BATCH, RATIO, seed=0))
    assert len(plan.fingerprint) == 16
    return plan


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    summary = result["summary"]
    table = Table(title="{negatives} negatives, {positives} positives".format(**result["clips"]))
    for heading in ("", "8 x 4", "64 x 4", "512 x 4", "goal"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, name, goal in (
        ("true frames / padded frames", "efficiency_{}", ">= .985, .96, .86"),
        ("  at most, if no positive is dropped", "bound_{}", ""),
        ("  in random order", "random_{}", ""),
        ("  without each epoch's deepest step", "efficiency_{}_but_deepest", ""),
        ("  the same, perfectly sorted", "sorted_{}_but_deepest", ""),
    ):
        figures = [summary[name.format(f"{ranks}x{RANK_BATCH}")] for ranks in EPOCHS]
        table.add_row(label, *(f"{figure:.4f}" for figure in figures), goal)
    if "build_s" not in summary:
        return table
    table.add_section()
    for label, name, form, goal in (
        ("a large set: clips", "large_clips", "{:.1e}", ""),
        ("  sort", "build_s", "{:.1f} s", ""),
        ("  peak memory", "rss_mb", "{:.0f} MB", ""),
        (f"  a step of {RANKS} x {RANK_BATCH}", "step_ms", "{:.2f} ms", "< 2 ms"),
        ("  first step of a run", "resume_ms_step_1", "{:.1f} ms", ""),
        ("  first step after a resume at 10^6", "resume_ms_step_1e6", "{:.1f} ms", "the same"),
    ):
        table.add_row(label, form.format(summary[name]), "", "", goal)
    return table


if __name__ == "__main__":
    main()
