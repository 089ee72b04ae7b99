"""The slots of one rank, batch by batch. The order's only state is the step that comes next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from dist_train.data.plan.plan import Plan


class Slot(NamedTuple):
    """One place in a batch: which clip, and the epoch that keys its augmentation."""

    clip: int
    epoch: int


class PlanSampler(Sampler[list[Slot]]):
    """Yields this rank's micro-batches of steps ``first`` to ``last`` (excluded), in plan order.

    Pass it to a ``DataLoader`` as ``batch_sampler``. It is rank-aware already: never hand that
    loader to ``accelerator.prepare``, which would shard it a second time.

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


class HeldOutSampler(Sampler[list[Slot]]):
    """Every clip of a held-out set, over all ranks, in batches of at most ``batch``.

    Clips are sorted by depth first, so that a batch holds clips of like depth and little padding,
    and dealt to the ranks in turn, so that the ranks have like work. All ranks have as many clips,
    so that they call a model whose weights are spread over them as often: where the clips do not
    go round, the deepest ones are there a second time.
    """

    def __init__(
        self, clips: list[int], frames: list[int], *, rank: int, world: int, batch: int
    ) -> None:
        by_depth = sorted(zip(frames, clips, strict=True))
        again = -len(by_depth) % world
        dealt = by_depth + [by_depth[-1 - i % len(by_depth)] for i in range(again)]
        mine = [Slot(clip, 0) for _, clip in dealt[rank::world]]
        self.batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]

    def __iter__(self) -> Iterator[list[Slot]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class DealtBatches(Sampler[list[Slot]]):
    """Every clip of a set once, over all ranks, in batches of ``batch`` clips that are the same
    whatever the number of ranks.

    Clips are sorted by depth, so that a batch has little padding, then cut into batches, which are
    dealt to the ranks in turn. A rank may have one batch more than another: for ranks that do not
    wait for each other at each batch.

    Attributes:
        clips: number of this rank's clips.
    """

    def __init__(
        self, clips: list[int], frames: list[int], *, rank: int, world: int, batch: int
    ) -> None:
        slots = [Slot(clip, 0) for _, clip in sorted(zip(frames, clips, strict=True))]
        batches = [slots[i : i + batch] for i in range(0, len(slots), batch)]
        self.batches = batches[rank::world]
        self.clips = sum(map(len, self.batches))

    def __iter__(self) -> Iterator[list[Slot]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


# A sampler's batches, begun by one and gone on with by another.


class HandedOver(Sampler[list[Slot]]):
    """The batches of a sampler, pass by pass. After ``begin``, whoever walks ``taken`` has the
    first ones of a pass, and the next to iterate, in another thread perhaps, has the rest.

    Attributes:
        are_used_up: there was no rest.
    """

    def __init__(self, batches: Sampler[list[Slot]]) -> None:
        self.are_used_up = False
        self._batches = batches
        self._lock = threading.Lock()
        self._left: Iterator[list[Slot]] | None = None

    def begin(self) -> None:
        self._left = iter(self._batches)

    def taken(self) -> Iterator[list[Slot]]:
        """Batches, until another has asked for its first one."""
        while True:
            with self._lock:
                if self._left is None:
                    return
                slots = next(self._left, None)
            if slots is None:
                self.are_used_up = True
                return
            yield slots

    def __iter__(self) -> Iterator[list[Slot]]:
        with self._lock:
            left, self._left = self._left, None
        yield from iter(self._batches) if left is None else left
