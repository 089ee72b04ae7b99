"""The clips of one rank, batch by batch, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike

from dist_train.data.plan.plan import Plan
from dist_train.data.plan.shuffle import Ints


class Slot(NamedTuple):
    """One place in a batch: a clip, and the epoch that keys its augmentation."""

    clip: int
    epoch: int


class PlanSampler:
    """This rank's micro-batches of steps ``first`` to ``last`` (excluded), in the plan's order.

    The order has no other state than the step, so a run resumes at any step without replay.

    Raises:
        PlanError: the global batch cannot be cut for this world size and accumulation.
    """

    def __init__(
        self, plan: Plan, *, rank: int, world: int, accumulate: int, first: int, last: int
    ) -> None:
        plan.check_cut(world, accumulate)
        self.plan, self.rank, self.world, self.accumulate = plan, rank, world, accumulate
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[list[Slot]]:
        for step in range(self.first, self.last):
            epoch = self.plan.epoch_of(step)
            for clips in self.plan.rank_batches(
                step, rank=self.rank, world=self.world, accumulate=self.accumulate
            ):
                yield [Slot(clip, epoch) for clip in clips.tolist()]

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate


class SlotBatches(Sequence[list[Slot]]):
    """Batches of clips; their slots are made when they are asked for, as there may be millions."""

    def __init__(self, clips: Ints, batch: int, numbers: range | None = None) -> None:
        self._clips, self._batch = clips, batch
        self._numbers = range(-(-len(clips) // batch)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> list[Slot]: ...
    @overload
    def __getitem__(self, at: slice) -> SlotBatches: ...
    def __getitem__(self, at: int | slice) -> list[Slot] | SlotBatches:
        if isinstance(at, slice):
            return SlotBatches(self._clips, self._batch, self._numbers[at])
        first = self._numbers[at] * self._batch
        return [Slot(clip, 0) for clip in self._clips[first : first + self._batch].tolist()]


def held_out_batches(
    clips: ArrayLike, frames: ArrayLike, *, rank: int, world: int, batch: int
) -> SlotBatches:
    """One rank's batches of a held-out set, of at most ``batch`` clips of similar depth.

    Clips are sorted by depth, for little padding, and dealt to the ranks in turn, for equal work.
    All ranks have the same number of clips, as they may have to call the model together: the
    deepest clips fill the last round a second time.
    """
    ordered = _by_depth(clips, frames)
    missing = -len(ordered) % world
    again = ordered[-1 - np.arange(missing) % len(ordered)] if missing else ordered[:0]
    return SlotBatches(np.concatenate([ordered, again])[rank::world], batch)


def dealt_batches(
    clips: ArrayLike, frames: ArrayLike, *, rank: int, world: int, batch: int
) -> SlotBatches:
    """One rank's batches of a set in which each clip is there once.

    The batches are the same for any number of ranks. A rank may have one more than another, so the
    ranks must not wait for each other at each batch.
    """
    return SlotBatches(_by_depth(clips, frames), batch)[rank::world]


def _by_depth(clips: ArrayLike, frames: ArrayLike) -> Ints:
    numbers, depths = np.asarray(clips, np.int64), np.asarray(frames)
    order = np.argsort(numbers, kind="stable")
    depths = depths[order]
    # numpy sorts small integers in a time like their number.
    is_small = depths.max(initial=0) < 1 << 16
    by_depth = np.argsort(depths.astype(np.uint16) if is_small else depths, kind="stable")
    ordered: Ints = numbers[order[by_depth]]
    return ordered
