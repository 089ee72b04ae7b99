"""Sampling weights as whole numbers, which add up exactly and alike on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.data.plan.shuffle import Ints
from dist_train.errors import PlanError

Floats = np.ndarray[Any, np.dtype[np.float64]]

#: What the greatest weight becomes. Weights below a 2^30th of it are lifted to 1.
UNIT = 1 << 30


def check_weights(weights: Floats, count: int) -> None:
    """Raise ``PlanError`` unless there is one finite weight of at least 0 for each negative."""
    if weights.shape != (count,):
        raise PlanError(f"there are {len(weights)} weights for {count} negatives")
    if not np.isfinite(weights).all() or (count and weights.min() < 0):
        raise PlanError(
            "a weight of a negative is negative, infinite or no number",
            fix="Use weights of at least 0; 0 leaves a clip out.",
        )


def balanced(weights: Floats, groups: Ints) -> Floats:
    """Weights over the number of clips of their group, so that groups count alike.

    Args:
        weights: float64 [n].
        groups: group codes, int64 [n].

    Raises:
        PlanError: the lengths differ.
    """
    if groups.shape != weights.shape:
        raise PlanError(f"there are {len(groups)} group codes for {len(weights)} negatives")
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shared: Floats = weights / sizes[group]
    return shared


def whole(weights: Floats) -> Ints:
    """Positive weights as whole numbers from 1 to ``UNIT``: int64 [n]."""
    units: Ints = np.maximum(1, np.rint(weights / weights.max() * UNIT)).astype(np.int64)
    return units


def arcs(weights: Floats, starts: Ints, needed: Ints) -> Ints:
    """Running sums of the weights, in which each bin's greatest weight counts ``UNIT``.

    A bin's pass has sum / greatest clips. Where one weight is so great that this is less than
    ``needed``, the greatest weights of the bin are lowered to one cap until it is not.

    Args:
        weights: greater than 0, by index: float64 [count].
        starts: bin b holds the indices starts[b] to starts[b + 1]: int64 [bins + 1].
        needed: int64 [bins], at most the clips of the bin.

    Returns:
        int64 [count].
    """
    ends = np.empty(len(weights), np.int64)
    total = 0
    for first, last, least in zip(
        starts[:-1].tolist(), starts[1:].tolist(), needed.tolist(), strict=True
    ):
        mine = weights[first:last]
        cap = _cap(mine, least)
        ends[first:last] = total + np.cumsum(whole(np.minimum(mine, cap)))
        total = int(ends[last - 1])
    return ends


def _cap(weights: Floats, needed: int) -> float:
    """The greatest cap, by bisection, under which a pass has at least ``needed`` clips."""
    low, high = float(weights.min()), float(weights.max())
    if _clips_a_pass(weights, high) >= needed:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        if _clips_a_pass(weights, middle) >= needed:
            low = middle
        else:
            high = middle
    return low


def _clips_a_pass(weights: Floats, cap: float) -> int:
    return int(whole(np.minimum(weights, cap)).sum()) // UNIT
