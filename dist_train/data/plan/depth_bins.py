"""The negatives in bins of like depth, and each bin's share of the draws."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.shuffle import Ints
from dist_train.errors import PlanError

#: Shares are counted in this part of what goes with one positive.
RESOLUTION = 64


@dataclass(frozen=True)
class Demand:
    """What training asks of all negatives together.

    Attributes:
        ratio: positives to negatives.
        block: negatives in a block.
        run: the most negatives in a run of blocks.
        straddling: whether a block can reach over the end of a pass over the positives, and so take
            what a bin gives to two epochs.
    """

    ratio: ClassRatio
    block: int
    run: int
    straddling: bool

    def most(self, share: int, cycle: int) -> int:
        """The most that a step takes of a bin that gives ``share`` in ``cycle`` epochs."""
        an_epoch = -(-share // cycle)
        straddling = min(self.block, 2 * an_epoch) if self.straddling else 0
        return max(1, min(self.run, an_epoch), straddling)


def least(most: int) -> int:
    """How many clips a bin needs if a step takes at most ``most``: negatives.py says why."""
    return max(1, 2 * (most - 1))


@dataclass(frozen=True, eq=False)
class DepthBins:
    """Bins of neighbouring depths, from shallow to deep.

    Attributes:
        starts: bin b holds the negatives of index starts[b] to starts[b + 1]: int64 [bins + 1].
        most: the most that a step takes of each bin: int64 [bins].
        shares: what each bin gives to each epoch.
    """

    starts: Ints
    most: Ints
    shares: BinQuotas


def depth_bins(
    positives: ByDepth, negatives: ByDepth, demand: Demand, natural: Ints | None
) -> DepthBins:
    """Bins as narrow as they can be: one depth each, where that has enough negatives.

    Neighbouring depths are merged until a bin has enough for a step's negatives to differ, and a
    share in the draws, so that none of its clips waits for ever. That goes from the deep end to the
    shallow one, because frames are lost the faster the deeper the clip. What is left over at the
    shallow end joins the last bin.

    Args:
        natural: None gives each bin the share of the positives that have its depths; negatives
            deeper or shallower than all positives get a token, or else depth would tell the class.
            Numbers, one for each depth of the negatives, give a bin its part of their sum: int64
            [depths].

    Raises:
        PlanError: even one bin of all negatives is too small.
    """
    depths = np.union1d(positives.depths, negatives.depths)
    clips = _below(negatives.starts, negatives.depths, depths)
    cycle, total = demand.ratio.positives * RESOLUTION, len(positives) * RESOLUTION
    if natural is None:
        asked = RESOLUTION * _below(positives.starts, positives.depths, depths)
        # The tokens stand where the search below, from the deep end, has passed all the depths that
        # they are for: at the shallowest of the shallow ones, and of the deep ones.
        asked[1:-1] = np.maximum(asked[1:-1], 1)
        deep = int(np.searchsorted(asked, total))
        asked[deep] -= deep < len(depths)
    else:
        summed = _below(np.append(0, np.cumsum(natural)), negatives.depths, depths)
        asked = np.rint(summed / max(summed[-1], 1) * total).astype(np.int64)
    asked *= demand.ratio.negatives

    def enough(first: int, last: int) -> bool:
        share = int(asked[last] - asked[first])
        return share > 0 and clips[last] - clips[first] >= least(demand.most(share, cycle))

    cuts = [len(depths)]
    for first in reversed(range(len(depths))):
        if enough(first, cuts[-1]):
            cuts.append(first)
    while cuts and cuts[-1] != 0:
        cuts.pop()
        if cuts and enough(0, cuts[-1]):
            cuts.append(0)
    if not cuts:
        raise PlanError(
            f"the selection holds {len(negatives)} negatives for train, and the batch needs "
            f"{demand.block} different ones a step, for which at least {least(demand.block)} are "
            f"needed",
            fix="Lower plan.batch, or select more clips.",
        )
    edges = np.array(cuts[::-1])
    most = [demand.most(int(share), cycle) for share in np.diff(asked[edges])]
    return DepthBins(clips[edges], np.array(most), BinQuotas(asked[edges], cycle))


def _below(sums: Ints, own: Ints, depths: Ints) -> Ints:
    """Running sums over a class's ``own`` depths, [own + 1], at the edges of all ``depths``:
    int64 [depths + 1]."""
    at: Ints = sums[np.append(np.searchsorted(own, depths), len(own))]
    return at


# How many negatives each depth bin gives to each epoch, without adding up epochs.


@dataclass(frozen=True, eq=False)
class BinQuotas:
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
