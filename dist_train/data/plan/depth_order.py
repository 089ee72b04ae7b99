"""Clips of one class, sorted by depth: all that the plan knows of a clip is its place here."""

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
    """Clips sorted by depth. Below, the *index* of a clip is its place in ``clips``.

    Clips of one depth stand in the order of a hash of their number, so that neighbours in the
    store, as the clips of one project, are not neighbours here.

    Attributes:
        clips: clip numbers, [count] of an integer dtype.
        depths: the different depths, ascending, int64 [k].
        starts: clips of ``depths[i]`` have the indices starts[i] to starts[i + 1] (excluded):
            int64 [k + 1].
    """

    clips: np.ndarray[Any, np.dtype[Any]]
    depths: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.clips)

    def depth_at(self, index: Ints) -> Ints:
        """Depths, in frames, of clips given by index."""
        return self.depths[np.searchsorted(self.starts, index, side="right") - 1]

    @cached_property
    def digest(self) -> str:
        """Identity of the clips and their depths, as 64 hex digits."""
        digest = hashlib.sha256()
        for array in (self.depths, self.starts):
            digest.update(array.astype("<i8").tobytes())
        # In pieces, so that no second copy of all numbers is made.
        for first in range(0, len(self.clips), 1 << 20):
            digest.update(self.clips[first : first + (1 << 20)].astype("<i8").tobytes())
        return digest.hexdigest()


def depth_order(clips: Ints, depths: Ints) -> Ints:
    """The permutation that sorts clips as ``ByDepth`` has them: int64 [count]."""
    return np.lexsort((mix(clips.astype(np.uint64)), depths))


def by_depth(clips: Ints, depths: Ints | None, name: str) -> ByDepth:
    """Sort clips by depth. Without depths all are taken to be one frame deep.

    Raises:
        PlanError: the depths are not one positive number for each clip, or a clip comes twice.
    """
    if depths is None:
        depths = np.ones(len(clips), np.int64)
    if clips.ndim != 1 or not np.issubdtype(clips.dtype, np.integer) or (clips < 0).any():
        raise PlanError(f"the clip numbers of the {name} are not a row of whole numbers from 0 on")
    if depths.shape != clips.shape or not _counts(depths).all():
        raise PlanError(f"the depths of the {name} are not one number of frames for each clip")
    if len(np.unique(clips)) < len(clips):
        raise PlanError(f"a clip number comes twice among the {name}")
    order = depth_order(clips, depths)
    values, firsts = np.unique(depths[order], return_index=True)
    starts = np.append(firsts, len(clips)).astype(np.int64)
    return ByDepth(clips[order], values.astype(np.int64), starts)


def _counts(depths: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which depths are whole numbers from 1 on: NaN, which is not below 1 either, is none."""
    counts: np.ndarray[Any, np.dtype[np.bool_]] = (
        np.isfinite(depths) & (depths >= 1) & (np.floor(depths) == depths)
    )
    return counts
