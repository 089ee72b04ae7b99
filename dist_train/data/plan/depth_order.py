"""Clips of one class, sorted by depth. The plan knows a clip by its index here only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dist_train.data.plan.shuffle import Ints, mix
from dist_train.data.plan.weights import Floats


@dataclass(frozen=True, eq=False)
class ByDepth:
    """Clips sorted by depth. The *index* of a clip is its position in ``clips``.

    Clips of equal depth are sorted by a hash of their number, so that neighbours in the store, such
    as clips of one project, are not neighbours here.

    Attributes:
        clips: clip numbers, integer [count].
        depths: the distinct depths, ascending, int64 [k].
        starts: clips of ``depths[i]`` have indices starts[i] to starts[i + 1]: int64 [k + 1].
        weights: float64 [count], all greater than 0. None: all clips count alike.
    """

    clips: np.ndarray[Any, np.dtype[Any]]
    depths: Ints
    starts: Ints
    weights: Floats | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def depth_at(self, index: Ints) -> Ints:
        """Depths, in frames, of the clips at ``index``: int64 [n]."""
        return self.depths[np.searchsorted(self.starts, index, side="right") - 1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the clip numbers and their depths, as 64 hex digits."""
        digest = hashlib.sha256()
        for array in (self.depths, self.starts):
            digest.update(array.astype("<i8").tobytes())
        # In pieces, so that no second copy of all numbers is made.
        for first in range(0, len(self.clips), 1 << 20):
            digest.update(self.clips[first : first + (1 << 20)].astype("<i8").tobytes())
        return digest.hexdigest()


def by_depth(clips: Ints, depths: Ints | None, weights: Floats | None = None) -> ByDepth:
    """Sort clips by depth, integer [count] from 1. Without depths all count as one frame deep."""
    depths = np.ones(len(clips), np.int64) if depths is None else depths
    values, counts = np.unique(depths, return_counts=True)
    starts = np.append(0, np.cumsum(counts)).astype(np.int64)
    # numpy sorts small integers in a time like their number.
    is_small = len(values) and values[-1] < 1 << 16
    order = np.argsort(depths.astype(np.uint16) if is_small else depths, kind="stable")
    for first, last in pairwise(starts.tolist()):
        of_depth = order[first:last]
        of_depth[:] = of_depth[np.argsort(mix(clips[of_depth].astype(np.uint64)))]
    weights = None if weights is None else weights[order]
    return ByDepth(clips[order], values.astype(np.int64), starts, weights)
