"""Sampling weights as integers, so that sums are exact and equal on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.data.plan.shuffle import Ints
from dist_train.errors import PlanError

Floats = np.ndarray[Any, np.dtype[np.float64]]

#: The integer of the greatest weight. Weights below a 2^30th of it become 1.
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
    """Divide each weight by the number of clips of its group, so that all groups count alike.

    Args:
        weights: float64 [n].
        groups: group codes, int64 [n].

    Raises:
        PlanError: the lengths differ.
    """
    if groups.shape != weights.shape:
        raise PlanError(f"there are {len(groups)} group codes for {len(weights)} negatives")
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    divided: Floats = weights / sizes[group]
    return divided


def as_integers(weights: Floats) -> Ints:
    """Positive weights as integers from 1 to ``UNIT``: int64 [n]."""
    integers: Ints = np.maximum(1, np.rint(weights / weights.max() * UNIT)).astype(np.int64)
    return integers


def arcs(weights: Floats, starts: Ints, needed: Ints) -> Ints:
    """Running sums of integer weights, scaled so that each bin's greatest weight is ``UNIT``.

    A pass over a bin has (sum / greatest weight) clips. If that is less than ``needed``, the bin's
    greatest weights are lowered to a cap.

    Args:
        weights: float64 [count], greater than 0, by index.
        starts: bin b holds the indices starts[b] to starts[b + 1]: int64 [bins + 1].
        needed: least clips of a pass: int64 [bins], at most the clips of the bin.

    Returns:
        Running sums: int64 [count].
    """
    ends = np.empty(len(weights), np.int64)
    total = 0
    for first, last, least in zip(
        starts[:-1].tolist(), starts[1:].tolist(), needed.tolist(), strict=True
    ):
        bin_weights = weights[first:last]
        cap = _cap(bin_weights, least)
        ends[first:last] = total + np.cumsum(as_integers(np.minimum(bin_weights, cap)))
        total = int(ends[last - 1])
    return ends


def _cap(weights: Floats, needed: int) -> float:
    """The greatest cap with at least ``needed`` clips in a pass, by bisection."""
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
    return int(as_integers(np.minimum(weights, cap)).sum()) // UNIT
