"""Where epochs, blocks and steps begin: whole numbers only.

The positives are one endless stream of passes over all of them, cut into blocks of ``take``. A
block that reaches over the end of a pass belongs to the epoch of the pass that it begins in, and is
its last step. The other blocks of the pass are whole; a step takes one of them, or, under a voxel
budget, a run of several.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from dist_train.data.plan.shuffle import Ints


@dataclass(frozen=True)
class Epochs:
    """The calendar of a run.

    Attributes:
        count: positives in a pass, at least ``take``.
        take: positives in a block.
        runs: the edges of the runs that the blocks are merged to, in blocks, for each number of
            whole blocks that a pass can have. Empty: each block is a step.
    """

    count: int
    take: int
    runs: dict[int, Ints] = field(default_factory=dict, compare=False)

    @property
    def period(self) -> int:
        """After so many epochs a pass and a block begin together again."""
        return self.take // gcd(self.count, self.take)

    @property
    def longest_tail(self) -> int:
        """The longest ``tail``, and the longest ``head``."""
        return self.take - gcd(self.count, self.take)

    def tail(self, epoch: int) -> int:
        """How many clips of the pass fall into the block that the next pass completes."""
        return (epoch + 1) * self.count % self.take

    def head(self, epoch: int) -> int:
        """How many clips of the pass complete the block that the pass before began."""
        return -epoch * self.count % self.take

    def whole(self, epoch: int) -> int:
        """Whole blocks of the pass: one of ``wholes``."""
        return (self.count - self.head(epoch) - self.tail(epoch)) // self.take

    @property
    def wholes(self) -> tuple[int, int]:
        """The fewest and the most whole blocks of a pass.

        Head and tail together have count % take clips, or ``take`` more.
        """
        most, rest = divmod(self.count, self.take)
        return (most - 1 if rest + self.take <= 2 * self.longest_tail else most), most

    def runs_of(self, epoch: int) -> int:
        """Runs that the pass's whole blocks are merged to."""
        return self._runs(self.whole(epoch))

    def blocks_of(self, epoch: int, run: int) -> tuple[int, int]:
        """The blocks, first and last (excluded), of a run of the pass."""
        if not self.runs:
            return run, run + 1
        edges = self.runs[self.whole(epoch)]
        return int(edges[run]), int(edges[run + 1])

    def edges(self, epoch: int) -> Ints:
        """Edges of the pass's runs, in blocks: int64 [runs_of + 1], from 0."""
        whole = self.whole(epoch)
        return self.runs[whole] if self.runs else np.arange(whole + 1)

    def steps(self, epoch: int) -> int:
        """Steps of the epoch: its runs, and the block that reaches over its end."""
        return self.runs_of(epoch) + bool(self.tail(epoch))

    def first_step(self, epoch: int) -> int:
        """The first step of the epoch; 0 is the first of the run."""
        # Of the blocks before the epoch, those that reach over the end of a pass; the others are
        # whole ones, and the passes with the most of them are those that the fewest leave over.
        straddling = epoch - epoch // self.period
        whole = -(-epoch * self.count // self.take) - straddling
        fewest, most = self.wholes
        if fewest == most:
            return epoch * self._runs(most) + straddling
        with_most = whole - epoch * fewest
        return with_most * self._runs(most) + (epoch - with_most) * self._runs(fewest) + straddling

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to, by bisection: no epoch is empty."""
        return bisect_right(range(step + 1), step, key=self.first_step) - 1

    def blocks_a_step(self) -> float:
        """The mean over all steps of a period, and so of an endless run."""
        return self.period * self.count / self.take / self.first_step(self.period)

    def _runs(self, whole: int) -> int:
        return len(self.runs[whole]) - 1 if self.runs else whole
