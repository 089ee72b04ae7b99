"""How many negatives each depth bin gives to each epoch, without adding up epochs.

Over ``cycle`` epochs bin b gives a whole number of negatives. What it gives in one of them is that
number over ``cycle``, rounded so that each epoch gives exactly as many as its positives ask for,
that no bin gives less than none, and that what was given before any epoch has a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from dist_train.data.shuffle import Ints


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares of depth bins.

    In epoch e the bins before bin b give floor((ends[b] + o) / cycle) together, with an offset o in
    [0, cycle) that is the same for all bins, so the figure never falls from one bin to the next.
    Over a cycle the offsets take each value once, and the floors sum to ends[b] exactly (Hermite's
    identity).

    Attributes:
        ends: what the bins before each give in ``cycle`` epochs: int64 [bins + 1], from 0.
        cycle: epochs.
    """

    ends: Ints
    cycle: int

    def offsets(self, epochs: Ints) -> Ints:
        """The offset of each epoch: int64 [n].

        With ends[-1] / cycle = u / v in lowest terms it is (cycle / v) * (e * u mod v), which makes
        the total of epoch e floor((e + 1) * u / v) - floor(e * u / v), plus a number below
        cycle / v, which does not change the total. The latter goes on by a golden section of its
        range, so that bins with less than a clip an epoch give theirs at even distances.
        """
        divisor = gcd(int(self.ends[-1]), self.cycle)
        u, v = int(self.ends[-1]) // divisor, self.cycle // divisor
        golden = next(i for i in range(divisor * 5 // 8, divisor + 1) if gcd(i, divisor) == 1)
        epochs = epochs % self.cycle
        return divisor * (epochs * (u % v) % v) + epochs // v * golden % divisor

    def edges(self, epoch: int) -> Ints:
        """What the bins before each give in an epoch: int64 [bins + 1], ascending."""
        return (self.ends + self.offsets(np.array([epoch]))) // self.cycle

    def before(self, epoch: int) -> Ints:
        """What each bin gave in all epochs before ``epoch``: int64 [bins]."""
        cycles, rest = divmod(epoch, self.cycle)
        quotient, remainder = np.divmod(self.ends, self.cycle)
        # In a cycle that is not over, a floor is rounded up where remainder + offset >= cycle.
        offsets = np.sort(self.offsets(np.arange(rest)))
        up = rest - np.searchsorted(offsets, self.cycle - remainder, side="left")
        given: Ints = np.diff(cycles * self.ends + rest * quotient + up)
        return given
