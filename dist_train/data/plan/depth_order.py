"""Clips of one class, sorted by depth. The plan knows a clip by its index here only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dist_train.data.plan.shuffle import Ints, mix
from dist_train.errors import PlanError


@dataclass(frozen=True, eq=False)
class ByDepth:
    """Clips sorted by depth. The *index* of a clip is its position in ``clips``.

    Clips of equal depth are sorted by a hash of their number, so that neighbours in the store, such
    as clips of one project, are not neighbours here.

    Attributes:
        clips: clip numbers, [count] of an integer dtype.
        depths: the distinct depths, ascending, int64 [k].
        starts: clips of ``depths[i]`` have indices starts[i] to starts[i + 1] (excluded): int64
            [k + 1].
    """

    clips: np.ndarray[Any, np.dtype[Any]]
    depths: Ints
    starts: Ints

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


def depth_order(clips: Ints, depths: Ints) -> Ints:
    """The permutation that sorts clips for ``ByDepth``: int64 [count]."""
    return np.lexsort((mix(clips.astype(np.uint64)), depths))


def by_depth(clips: Ints, depths: Ints | None, name: str) -> ByDepth:
    """Sort clips by depth. Without depths all count as one frame deep.

    Args:
        clips: clip numbers, int64 [count].
        depths: in frames, [count].
        name: of the class, for messages.

    Raises:
        PlanError: the depths are not one positive integer for each clip, or a clip is repeated.
    """
    if depths is None:
        depths = np.ones(len(clips), np.int64)
    if clips.ndim != 1 or not np.issubdtype(clips.dtype, np.integer) or (clips < 0).any():
        raise PlanError(f"the clip numbers of the {name} are not integers of at least 0")
    if depths.shape != clips.shape or not _are_counts(depths).all():
        raise PlanError(f"the depths of the {name} are not one number of frames for each clip")
    if len(np.unique(clips)) < len(clips):
        raise PlanError(f"a clip number is repeated among the {name}")
    order = depth_order(clips, depths)
    values, firsts = np.unique(depths[order], return_index=True)
    starts = np.append(firsts, len(clips)).astype(np.int64)
    return ByDepth(clips[order], values.astype(np.int64), starts)


def _are_counts(depths: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each depth is an integer of at least 1."""
    are_counts: np.ndarray[Any, np.dtype[np.bool_]] = (
        np.isfinite(depths) & (depths >= 1) & (np.floor(depths) == depths)
    )
    return are_counts
