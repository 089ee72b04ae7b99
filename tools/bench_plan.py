"""How little the plan pads, and what it costs from half a million to a hundred million clips.

Takes the depths of the Clog Loss challenge's clips from a table, and measures how many of the
padded frames are true ones, in the plan's bands and in random order. Then it sorts 10^8 clips into
a cache, opens it again in a fresh process, and takes steps. benchmarks/plan.md says how to read the
figures.

    python tools/bench_plan.py --depths FILE [--quick] [--json FILE]
"""

from __future__ import annotations

import csv
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import finish, memory, options, say
from rich.table import Table

from dist_train.data.plan.cache import sorted_classes
from dist_train.data.plan.plan import Plan, make_plan, plan_of
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import Floats

POSITIVES = 1_887
#: The clips of a rank at a step, 1 to 3.
RANK_BATCH, RATIO = 4, (1, 3)
#: Epochs and seeds that the figures are means of: enough that none moves in its third digit.
EPOCHS, SEEDS = {8: 2, 64: 8, 512: 24}, 3
CLIPS, RANKS, FAR_STEP = 100_000_000, 1_024, 10**6
#: Steps that are timed, one after the other.
STEPS = 200


def main() -> None:
    parser = options(__doc__, "leave the 10^8 clips out")
    parser.add_argument(
        "--depths",
        type=Path,
        required=True,
        help="CSV of clips by num_frames, with the columns all and micro_stalled",
    )
    arguments = parser.parse_args()
    clips = read_clips(arguments.depths)
    result = measure(clips, quick=arguments.quick)
    finish(arguments.json, result, as_table(result))


def measure(clips: Clips, *, quick: bool) -> dict[str, Any]:
    summary: dict[str, float | None] = {}
    for ranks in (8, 64, 512):
        say(f"{ranks} ranks x {RANK_BATCH}")
        summary |= padding(clips, ranks)
    summary |= dict.fromkeys(
        ("build_s_1e8", "reopen_s_1e8", "rss_mb_1e8", "step_ms_1e8", "resume_ms_step_1e6")
    )
    if not quick:
        with tempfile.TemporaryDirectory(prefix="bench_plan.") as folder:
            summary |= at_scale(clips, Path(folder))
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


def padding(clips: Clips, ranks: int) -> dict[str, float | None]:
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


# --- a hundred million clips ----------------------------------------------------------------------


def at_scale(clips: Clips, folder: Path) -> dict[str, float | None]:
    """Sort ``CLIPS`` clips of the same depths and share of positives in one process, and take steps
    of ``RANKS`` ranks in another."""
    say(f"making {CLIPS} clips")
    rng = np.random.default_rng(0)
    labels = (rng.random(CLIPS, np.float32) < POSITIVES / 573_048).astype(np.int8)
    depths = rng.choice(np.concatenate([clips.positives, clips.negatives]).astype(np.int16), CLIPS)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "depths.npy", depths)
    del labels, depths
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for what, work in (("sorting them", build), ("taking steps", take_steps)):
        say(what)
        with ProcessPoolExecutor(1, spawn) as fresh:
            found[what] = fresh.submit(work, folder).result()
    built, taken = found.values()
    peak = max(built.pop("rss_mb"), taken.pop("rss_mb"))
    return {**built, **taken, "rss_mb_1e8": peak}


def read_columns(folder: Path) -> tuple[Ints, Ints]:
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("depths", "labels"))


def build(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    sorted_classes(folder / "cache", "bench", lambda: read_columns(folder))
    return {"build_s_1e8": time.perf_counter() - began, "rss_mb": memory("VmHWM") / 1e6}


def take_steps(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    plan = open_plan(folder)
    found = {"reopen_s_1e8": time.perf_counter() - began}

    def milliseconds(plan: Plan, step: int) -> float:
        began = time.perf_counter()
        plan.rank_batches(step, rank=RANKS // 2, world=RANKS, accumulate=1)
        return (time.perf_counter() - began) * 1e3

    times = [milliseconds(plan, step) for step in range(STEPS)]
    found["step_ms_1e8"] = float(np.median(times))
    # The first step of a plan that was just opened also works out what its epoch draws.
    for name, step in (("1", 1), ("1e6", FAR_STEP)):
        resumed = [milliseconds(open_plan(folder), step) for _ in range(5)]
        found[f"resume_ms_step_{name}"] = float(np.median(resumed))
    return {**found, "rss_mb": memory("VmHWM") / 1e6}


def open_plan(folder: Path) -> Plan:
    positives, negatives = sorted_classes(folder / "cache", "bench", lambda: read_columns(folder))
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
    if summary["build_s_1e8"] is None:
        return table
    table.add_section()
    for label, name, form, goal in (
        ("10^8 clips: sort, once", "build_s_1e8", "{:.1f} s", "<= 60 s"),
        ("  open again", "reopen_s_1e8", "{:.3f} s", "< 2 s"),
        ("  peak memory", "rss_mb_1e8", "{:.0f} MB", "<= 2000 MB"),
        (f"  a step of {RANKS} x {RANK_BATCH}", "step_ms_1e8", "{:.2f} ms", "< 2 ms"),
        ("  first step of a run", "resume_ms_step_1", "{:.1f} ms", ""),
        ("  first step after a resume at 10^6", "resume_ms_step_1e6", "{:.1f} ms", "the same"),
    ):
        table.add_row(label, form.format(summary[name]), "", "", goal)
    return table


if __name__ == "__main__":
    main()
