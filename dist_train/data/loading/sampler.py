"""The clips of one rank, batch by batch, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dist_train.data.plan.plan import Plan


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


def held_out_batches(
    clips: list[int], frames: list[int], *, rank: int, world: int, batch: int
) -> list[list[Slot]]:
    """One rank's batches of a held-out set, of at most ``batch`` clips of similar depth.

    Clips are sorted by depth, for little padding, and dealt to the ranks in turn, for equal work.
    All ranks have the same number of clips, as they may have to call the model together: the
    deepest clips fill the last round a second time.
    """
    by_depth = sorted(zip(frames, clips, strict=True))
    missing = -len(by_depth) % world
    dealt = by_depth + [by_depth[-1 - i % len(by_depth)] for i in range(missing)]
    return _cut(dealt[rank::world], batch)


def dealt_batches(
    clips: list[int], frames: list[int], *, rank: int, world: int, batch: int
) -> list[list[Slot]]:
    """One rank's batches of a set in which each clip is there once.

    The batches are the same for any number of ranks. A rank may have one more than another, so the
    ranks must not wait for each other at each batch.
    """
    return _cut(sorted(zip(frames, clips, strict=True)), batch)[rank::world]


def _cut(clips: list[tuple[int, int]], batch: int) -> list[list[Slot]]:
    slots = [Slot(clip, 0) for _, clip in clips]
    return [slots[i : i + batch] for i in range(0, len(slots), batch)]
