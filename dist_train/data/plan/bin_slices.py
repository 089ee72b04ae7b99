"""The slices of the bins' streams that each piece of an epoch takes.

The pieces of an epoch are the head (completes the previous pass's block), the runs of whole blocks,
and the tail (begins the next pass's block). The epoch's negatives form a row of slots in order of
depth. The pieces divide that row, and so do the bins, by their quotas. A piece takes from each bin
the slots in which the two overlap. In order of time, the pieces then take consecutive positions of
each bin's stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_bins import BinQuotas
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.shuffle import Ints


@dataclass(frozen=True, eq=False)
class BinSlices:
    """The slices of one epoch: piece i takes the entries first[i] to first[i + 1].

    Pieces are numbered in order of time: 0 is the head, then the runs, and the last is the tail.
    Head and tail are empty if the pass begins or ends with a whole block.

    Attributes:
        first: int64 [pieces + 1].
        bins: the bin of each entry, ascending within a piece: int64 [entries].
        positions: the first position in the bin's stream: int64 [entries].
        counts: number of clips from there on: int64 [entries].
    """

    first: Ints
    bins: Ints
    positions: Ints
    counts: Ints

    def of(self, piece: int) -> tuple[Ints, Ints, Ints]:
        """(bins, positions, counts) of a piece; -1 is the tail."""
        piece %= len(self.first) - 1
        entries = slice(int(self.first[piece]), int(self.first[piece + 1]))
        return self.bins[entries], self.positions[entries], self.counts[entries]


def epoch_slices(
    epoch: int, epochs: Epochs, quotas: BinQuotas, visits: Ints, split: int, ratio: ClassRatio
) -> BinSlices:
    """The slices of an epoch.

    Args:
        visits: the runs of the epoch, numbered from the shallow end, in order of time: int64
            [runs].
        split: number of runs on the shallow side of the tail and the head.
        ratio: positives to negatives.
    """
    block = ratio.negatives_of(epochs.per_block)
    # The tail takes its share of the block's negatives, rounded down; the head takes the rest.
    tail = ratio.negatives_of(epochs.tail(epoch))
    before = epochs.tail(epoch - 1) if epoch else 0
    head = block - ratio.negatives_of(before) if before else 0
    runs = np.diff(epochs.edges(epoch)) * block
    time_of_run = np.empty(len(visits), np.int64)
    time_of_run[visits] = np.arange(1, len(visits) + 1)

    # In order of depth the tail and the head lie side by side between two runs.
    pieces = np.insert(runs, split, [tail, head]).cumsum()
    pieces = np.insert(pieces, 0, 0)
    time = np.insert(time_of_run, split, [len(visits) + 1, 0])

    # Between two neighbouring cuts there is one piece and one bin.
    bin_edges = quotas.edges(epoch)
    cuts = np.union1d(pieces, bin_edges)
    counts, left = np.diff(cuts), cuts[:-1]
    piece = time[np.searchsorted(pieces, left, side="right") - 1]
    bins = np.searchsorted(bin_edges, left, side="right") - 1
    by_bin = np.lexsort((piece, bins))
    taken = np.empty(len(counts), np.int64)
    taken[by_bin] = np.cumsum(counts[by_bin]) - counts[by_bin]
    positions = quotas.before(epoch)[bins] + taken - bin_edges[bins]
    by_piece = np.lexsort((bins, piece))
    first = np.searchsorted(piece[by_piece], np.arange(len(time) + 1))
    return BinSlices(first, bins[by_piece], positions[by_piece], counts[by_piece])
