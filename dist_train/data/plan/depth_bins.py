"""The clips of a class in bins of similar depth, and the quota of each bin in each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from dist_train.data.plan.depth_order import ByDepth, too_few_clips
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import as_integers

#: Quotas are counted in 64ths of the class's clips that go with one clip of the anchor.
RESOLUTION = 64


def least_clips(most: int) -> int:
    """The least clips of a bin from which a step takes at most ``most``: see streams.py."""
    return max(1, 2 * (most - 1))


@dataclass(frozen=True, eq=False)
class DepthBins:
    """Bins of neighbouring depths, from shallow to deep.

    Bin b holds the clips of index starts[b] to starts[b + 1], int64 [bins + 1]. A step takes at
    most ``most`` clips from it, int64 [bins].
    """

    starts: Ints
    most: Ints
    quotas: BinQuotas


def depth_bins(
    anchor: ByDepth,
    clips: ByDepth,
    rules: PlanRules,
    number: int,
    longest: int,
    *,
    straddling: bool,
) -> DepthBins:
    """Bins of a class, as narrow as possible: one depth each, if it has enough clips.

    Neighbouring depths are merged until a bin has a quota above 0 and enough clips for a step
    without repetition: from deep to shallow, because padding costs most at the deep end. Depths
    left over at the shallow end join the last bin.

    "matched" gives each bin the quota of the anchor's clips of its depths. Clips deeper or
    shallower than all of the anchor's get a small quota, as depth would else reveal the class.
    "natural" gives each bin a quota in proportion to its clips or their weights.

    Args:
        number: number of the class in the rules' ratio.
        longest: the most blocks of a step.
        straddling: whether a block can span the end of a pass over the anchor, and so take the
            quotas of two epochs from a bin.

    Raises:
        PlanError: even one bin of all clips is too small.
    """
    depths = np.union1d(anchor.depths, clips.depths)
    below = _below(clips.starts, clips.depths, depths)
    cycle, total = rules.ratio[0] * RESOLUTION, len(anchor) * RESOLUTION
    per_block = rules.clips_of(number)
    if rules.matching == "matched":
        asked = RESOLUTION * _below(anchor.starts, anchor.depths, depths)
        # The small quotas of 1 go to the shallowest depth below, and to the shallowest depth above
        # those of the anchor: the search below, from the deep end, reaches them last.
        asked[1:-1] = np.maximum(asked[1:-1], 1)
        deep = int(np.searchsorted(asked, total))
        asked[deep] -= deep < len(depths)
    else:
        sums = clips.starts
        if clips.weights is not None:
            sums = np.append(0, np.cumsum(as_integers(clips.weights)))[sums]
        summed = _below(sums, clips.depths, depths)
        asked = np.rint(summed / max(summed[-1], 1) * total).astype(np.int64)
    asked *= rules.ratio[number]

    def most_of(quota: int) -> int:
        """The most clips that a step takes from a bin that gives ``quota`` in a cycle."""
        per_epoch = -(-quota // cycle)
        spanning = min(per_block, 2 * per_epoch) if straddling else 0
        return max(1, min(longest * per_block, per_epoch), spanning)

    def is_enough(first: int, last: int) -> bool:
        quota = int(asked[last] - asked[first])
        return quota > 0 and below[last] - below[first] >= least_clips(most_of(quota))

    cuts = [len(depths)]
    for first in reversed(range(len(depths))):
        if is_enough(first, cuts[-1]):
            cuts.append(first)
    while cuts and cuts[-1] != 0:
        cuts.pop()
        if cuts and is_enough(0, cuts[-1]):
            cuts.append(0)
    if not cuts:
        raise too_few_clips(clips, per_block, least_clips(per_block))
    edges = np.array(cuts[::-1])
    most = [most_of(int(quota)) for quota in np.diff(asked[edges])]
    return DepthBins(below[edges], np.array(most), BinQuotas(asked[edges], cycle))


def _below(sums: Ints, own: Ints, depths: Ints) -> Ints:
    """Look up a class's running sums over its ``own`` depths at the edges of all ``depths``."""
    looked_up: Ints = sums[np.append(np.searchsorted(own, depths), len(own))]
    return looked_up


@dataclass(frozen=True, eq=False)
class BinQuotas:
    """The number of clips that each bin gives to each epoch, in closed form.

    In epoch e the bins before bin b give floor((ends[b] + o) / cycle) together. The offset o in
    [0, cycle) is the same for all bins, so no bin gives less than 0. Over a cycle the offset takes
    each value once, and the floors sum to ends[b] exactly (Hermite's identity).

    Attributes:
        ends: clips that the bins before each give in ``cycle`` epochs: int64 [bins + 1], from 0.
        cycle: number of epochs after which the quotas repeat.
    """

    ends: Ints
    cycle: int

    def offsets(self, epochs: Ints) -> Ints:
        """The offset of each epoch: int64 [n].

        Let ends[-1] / cycle = u / v in lowest terms. The offset is (cycle / v) * (e * u mod v),
        which makes the total of epoch e floor((e + 1) * u / v) - floor(e * u / v), plus a number
        below cycle / v, which does not change the total. That number advances by a golden section
        of its range, so that bins with less than one clip per epoch give theirs evenly in time.
        """
        divisor = gcd(int(self.ends[-1]), self.cycle)
        u, v = int(self.ends[-1]) // divisor, self.cycle // divisor
        golden = next(i for i in range(divisor * 5 // 8, divisor + 1) if gcd(i, divisor) == 1)
        epochs = epochs % self.cycle
        return divisor * (epochs * (u % v) % v) + epochs // v * golden % divisor

    def edges(self, epoch: int) -> Ints:
        """Clips that the bins before each give in an epoch: int64 [bins + 1], ascending."""
        return (self.ends + self.offsets(np.array([epoch]))) // self.cycle

    def before(self, epoch: int) -> Ints:
        """Clips that each bin gave in all epochs before ``epoch``: int64 [bins]."""
        cycles, rest = divmod(epoch, self.cycle)
        quotient, remainder = np.divmod(self.ends, self.cycle)
        # In the unfinished cycle a floor is quotient + 1 where remainder + offset >= cycle.
        offsets = np.sort(self.offsets(np.arange(rest)))
        plus_one = rest - np.searchsorted(offsets, self.cycle - remainder, side="left")
        given: Ints = np.diff(cycles * self.ends + rest * quotient + plus_one)
        return given
