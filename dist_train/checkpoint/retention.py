"""Which checkpoints stay on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.metrics import higher_is_better

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class RetentionPolicy:
    """A checkpoint stays if any of these says so.

    Attributes:
        last: the newest so many, at least 1.
        every: those whose step is a multiple of it, for ever.
        best: a metric as the log names it, such as val/auc; the one with its best value stays. Of
            equals, the newest.
    """

    last: int
    every: int | None = None
    best: str | None = None


def to_remove(saved: Mapping[int, Metrics], newest: int, keep: RetentionPolicy) -> list[int]:
    """Steps of the checkpoints that go, ascending.

    Those after ``newest``, the one just written, go too: they are damaged, or the run would have
    resumed from them.

    Args:
        saved: the metrics of each checkpoint there is, by step.
    """
    steps = sorted(step for step in saved if step <= newest)
    stay = set(steps[-keep.last :])
    if keep.every is not None:
        stay.update(step for step in steps if step % keep.every == 0)
    if keep.best is not None:
        sign = 1.0 if higher_is_better(keep.best) else -1.0
        known = [
            (sign * value, step)
            for step in steps
            if (value := saved[step].get(keep.best)) is not None and not math.isnan(value)
        ]
        if known:
            stay.add(max(known)[1])
    return sorted(saved.keys() - stay)
