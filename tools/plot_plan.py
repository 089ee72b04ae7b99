"""Draw epochs of the plan: the depth of each step, and the padding of it, in bands and at random.

Takes the table of depths that tools/bench_plan.py takes, and makes the picture of docs/sampling.md.

    python tools/plot_plan.py --depths FILE [--out PNG]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from bench_plan import RANK_BATCH, RATIO, Clips, plan_for, read_clips

from dist_train.data.plan.plan import make_plan
from dist_train.data.plan.shuffle import Ints

RANKS = (8, 64, 512)
#: So many epochs of each: with 512 ranks one has but four steps.
EPOCHS = {8: 1, 64: 4, 512: 16}
BANDED, RANDOM, LINE = "#1f6f8b", "#c77b30", "#b8b8b8"
OUT = Path(__file__).parent.parent / "docs" / "plan.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--depths",
        type=Path,
        required=True,
        help="CSV of clips by num_frames, with the columns all and micro_stalled",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: docs/plan.png")
    arguments = parser.parse_args()
    draw(read_clips(arguments.depths), arguments.out)


def draw(clips: Clips, out: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(RANKS), figsize=(12, 8.4), layout="constrained")
    for column, ranks in zip(axes.T, RANKS, strict=True):
        banded, ends = banded_steps(clips, ranks)
        random = random_steps(clips, ranks, len(banded))
        depth_by_step(column[0], banded, ends)
        padding_by_step(column[1], banded, random, ends)
        frames_by_step(column[2], banded, random)
        column[0].set_title(f"{ranks} ranks x {RANK_BATCH} clips, {count(EPOCHS[ranks])}")
    for row, label in zip(
        axes[:, 0], ("frames", "true / padded frames", "frames a clip, padded"), strict=True
    ):
        row.set_ylabel(label)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def count(epochs: int) -> str:
    return "one epoch" if epochs == 1 else f"{epochs} epochs"


def banded_steps(clips: Clips, ranks: int) -> tuple[list[Ints], list[int]]:
    """The depths of the clips of each step, and the first step of each epoch but the first."""
    plan = plan_for(clips, ranks, seed=0)
    epochs = EPOCHS[ranks]
    steps = [plan.depths(step) for step in range(plan.first_step(epochs))]
    return steps, [plan.first_step(epoch) for epoch in range(1, epochs)]


def random_steps(clips: Clips, ranks: int, steps: int) -> list[Ints]:
    """The same of the plan that is told no depths."""
    depths = np.concatenate([clips.positives, clips.negatives])
    positives, negatives = np.split(np.arange(len(depths)), [len(clips.positives)])
    plan = make_plan(positives, negatives, batch=ranks * RANK_BATCH, ratio=RATIO, seed=0)
    return [depths[plan.global_batch(step)] for step in range(steps)]


def depth_by_step(axis: Any, steps: list[Ints], ends: list[int]) -> None:
    """From the shallowest to the deepest clip of each step, and their mean."""
    number = np.arange(len(steps))
    low, mean, high = (np.array([f(step) for step in steps]) for f in (np.min, np.mean, np.max))
    axis.vlines(number, low, high, color=BANDED, linewidth=max(1, 160 / len(steps)), alpha=0.45)
    axis.plot(number, mean, ".", color=BANDED, markersize=4, label="mean of a step, and its range")
    lines(axis, ends)
    axis.set_xlabel("step")
    axis.legend(frameon=False, fontsize=8, loc="upper right")


def padding_by_step(axis: Any, banded: list[Ints], random: list[Ints], ends: list[int]) -> None:
    for name, steps, colour in (("bands", banded, BANDED), ("random", random, RANDOM)):
        found = np.array([step.mean() / step.max() for step in steps])
        axis.plot(found, ".", color=colour, markersize=5, label=f"{name}: mean {found.mean():.3f}")
    lines(axis, ends)
    axis.set_ylim(0, 1.28)
    axis.set_xlabel("step")
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def frames_by_step(axis: Any, banded: list[Ints], random: list[Ints]) -> None:
    """What a clip costs, from the cheapest step to the dearest; the area is the whole cost."""
    share = np.linspace(0, 1, len(banded))
    for name, steps, colour in (("random", random, RANDOM), ("bands", banded, BANDED)):
        padded = np.sort([step.max() for step in steps])
        axis.fill_between(share, padded, step="mid", color=colour, alpha=0.3)
        axis.plot(share, padded, drawstyle="steps-mid", color=colour, label=name)
    true = np.sort([step.mean() for step in banded])
    axis.plot(
        share, true, drawstyle="steps-mid", color="black", linewidth=1, label="true, in bands"
    )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("share of the steps, by cost")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def lines(axis: Any, places: list[int]) -> None:
    for place in places:
        axis.axvline(place - 0.5, color=LINE, linewidth=0.6, zorder=0)


if __name__ == "__main__":
    main()
