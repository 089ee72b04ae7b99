"""The first steps of epochs, in integer arithmetic.

The anchor's clips are an endless stream of passes, cut into blocks. A block that spans the end of a
pass is the last step of the epoch in which it begins. The other blocks of a pass are whole blocks.
A step takes one of them or, under a voxel budget, a run of several.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from dist_train.data.plan.shuffle import Ints


@dataclass(frozen=True)
class Epochs:
    """The steps, blocks and passes of each epoch.

    Attributes:
        count: the anchor's clips, which are a pass.
        per_block: the anchor's clips in a block.
        runs: for each possible number of whole blocks, the edges of the runs, in blocks: int64
            [runs + 1]. By default each block is a run.
    """

    count: int
    per_block: int
    runs: dict[int, Ints] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for whole in self.whole_block_counts:
            self.runs.setdefault(whole, np.arange(whole + 1))

    @property
    def period(self) -> int:
        """The number of epochs after which a pass and a block begin together again."""
        return self.per_block // gcd(self.count, self.per_block)

    @property
    def longest_tail(self) -> int:
        """The greatest ``tail``, which is also the greatest ``head``."""
        return self.per_block - gcd(self.count, self.per_block)

    def tail(self, epoch: int) -> int:
        """Clips of the pass that begin the block that the next pass completes."""
        return (epoch + 1) * self.count % self.per_block

    def head(self, epoch: int) -> int:
        """Clips of the pass that complete the block that the previous pass began."""
        return -epoch * self.count % self.per_block

    def whole_blocks(self, epoch: int) -> int:
        """Whole blocks of the pass, one of ``whole_block_counts``."""
        return (self.count - self.head(epoch) - self.tail(epoch)) // self.per_block

    @property
    def whole_block_counts(self) -> tuple[int, int]:
        """The fewest and the most whole blocks of a pass.

        Head and tail together have count % per_block clips, or ``per_block`` more.
        """
        most, rest = divmod(self.count, self.per_block)
        return (most - 1 if rest + self.per_block <= 2 * self.longest_tail else most), most

    def edges(self, epoch: int) -> Ints:
        """Edges of the pass's runs, in blocks: int64 [runs + 1], from 0."""
        return self.runs[self.whole_blocks(epoch)]

    def first_step(self, epoch: int) -> int:
        """The first step of the epoch, counted from the start of the run."""
        # Blocks before the epoch either span the end of a pass or are whole. Each pass has the
        # fewest or the most whole blocks, so their total tells how many passes have the most.
        straddling = epoch - epoch // self.period
        whole = -(-epoch * self.count // self.per_block) - straddling
        fewest, most = self.whole_block_counts
        with_most = whole - epoch * fewest if fewest < most else epoch
        runs_of_most, runs_of_fewest = len(self.runs[most]) - 1, len(self.runs[fewest]) - 1
        return with_most * runs_of_most + (epoch - with_most) * runs_of_fewest + straddling

    def epoch_of(self, step: int) -> int:
        """The epoch of a step, by bisection, as no epoch is empty."""
        return bisect_right(range(step + 1), step, key=self.first_step) - 1

    def blocks_a_step(self) -> float:
        """Mean blocks of a step over a period, which is the mean of an endless run."""
        return self.period * self.count / self.per_block / self.first_step(self.period)
