"""Sampling weights as integers, so that sums are exact and equal on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.data.plan.shuffle import Ints

Floats = np.ndarray[Any, np.dtype[np.float64]]

#: The integer of the greatest weight. Weights below a 2^30th of it become 1.
UNIT = 1 << 30


def as_integers(weights: Floats) -> Ints:
    """Positive weights as integers from 1 to ``UNIT``: int64 [n]."""
    integers: Ints = np.maximum(1, np.rint(weights / weights.max(initial=0.0) * UNIT)).astype(
        np.int64
    )
    return integers


def arcs(weights: Floats, starts: Ints, needed: Ints) -> Ints:
    """Running sums of integer weights, scaled so that each bin's greatest weight is ``UNIT``: int64
    [count].

    A pass over a bin has (sum / greatest weight) clips. If that is less than ``needed``, int64
    [bins], the bin's greatest weights are lowered to a cap.

    Args:
        weights: float64 [count], greater than 0, by index.
        starts: see ``DepthBins``.
    """
    bins = zip(np.split(weights, starts[1:-1]), needed.tolist(), strict=True)
    return np.cumsum(np.concatenate([_capped(bin_weights, least) for bin_weights, least in bins]))


def _capped(weights: Floats, needed: int) -> Ints:
    """Integer weights under the greatest cap with at least ``needed`` clips in a pass."""
    low, high = float(weights.min()), float(weights.max())
    capped = as_integers(weights)
    if capped.sum() // UNIT >= needed:
        return capped
    for _ in range(40):
        middle = (low + high) / 2
        if as_integers(np.minimum(weights, middle)).sum() // UNIT >= needed:
            low = middle
        else:
            high = middle
    return as_integers(np.minimum(weights, low))
