"""Which checkpoints stay on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.class_metrics import higher_is_better

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class RetentionPolicy:
    """A checkpoint stays if one of these says so.

    Attributes:
        last: the number of newest checkpoints, at least 1.
        every: steps that are multiples of this number.
        best: a metric by its name in the log, such as val/auc: the checkpoint with the best value,
            of equals the newest.
    """

    last: int
    every: int | None = None
    best: str | None = None


def to_remove(saved: Mapping[int, Metrics], newest: int, keep: RetentionPolicy) -> list[int]:
    """Steps of the checkpoints to remove, ascending.

    They include all after ``newest``, the one just written: these are damaged, or the run would
    have resumed from them.

    Args:
        saved: the metrics of each existing checkpoint, by step.
    """
    steps = sorted(step for step in saved if step <= newest)
    stay = set(steps[-keep.last :])
    if keep.every is not None:
        stay.update(step for step in steps if step % keep.every == 0)
    if keep.best is not None:
        best = best_step({step: saved[step] for step in steps}, keep.best)
        stay.update([] if best is None else [best])
    return sorted(saved.keys() - stay)


def best_step(saved: Mapping[int, Metrics], metric: str) -> int | None:
    """The step with the best value of a metric, of equals the last; None if none has a value."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    known = [
        (sign * value, step)
        for step, metrics in saved.items()
        if (value := metrics.get(metric)) is not None and not math.isnan(value)
    ]
    return max(known)[1] if known else None
