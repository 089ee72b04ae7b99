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
from dist_train.errors import PlanError


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
        name: what messages call the clips, such as "positives".
    """

    clips: np.ndarray[Any, np.dtype[Any]]
    depths: Ints
    starts: Ints
    weights: Floats | None = None
    name: str = "clips"

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


def by_depth(
    clips: Ints,
    depths: Ints | None,
    weights: Floats | None = None,
    groups: Ints | None = None,
    *,
    name: str = "clips",
) -> ByDepth:
    """Sort the clips of a class, given by number, integer [count], in any order.

    Args:
        depths: frames of each clip, integer [count], from 1. None: all count as one frame deep, so
            their order is random.
        weights: float64 [count], the relative frequency of each clip within its depth bin; 0 leaves
            the clip out. They do not count for the anchor.
        groups: group code of each clip, int64 [count]. Weights are divided by the size of the
            group, so that all groups are equally frequent.
        name: see ``ByDepth``.
    """
    depths = np.ones(len(clips), np.int64) if depths is None else depths
    if groups is not None:
        _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        weights = (1.0 if weights is None else weights) / sizes[group]
    if weights is not None:
        kept = weights > 0
        clips, depths, weights = clips[kept], depths[kept], weights[kept]
    values, counts = np.unique(depths, return_counts=True)
    starts = np.append(0, np.cumsum(counts)).astype(np.int64)
    # numpy sorts small integers in a time like their number.
    is_small = len(values) and values[-1] < 1 << 16
    order = np.argsort(depths.astype(np.uint16) if is_small else depths, kind="stable")
    for first, last in pairwise(starts.tolist()):
        of_depth = order[first:last]
        of_depth[:] = of_depth[np.argsort(mix(clips[of_depth].astype(np.uint64)))]
    weights = None if weights is None else weights[order]
    return ByDepth(clips[order], values.astype(np.int64), starts, weights, name)


def too_few_clips(clips: ByDepth, per_batch: int, needed: int) -> PlanError:
    """The error of a class with fewer than ``needed`` clips, of which a batch has ``per_batch``."""
    return PlanError(
        f"the train split has {len(clips)} {clips.name}; a batch with {per_batch} different "
        f"{clips.name} needs at least {needed}",
        fix="Lower plan.batch, or select more clips.",
    )
