"""Which places of which bin's stream each piece of an epoch takes.

An epoch has its pieces: the head, which completes the block that the pass before began, the runs of
whole blocks, and the tail, which begins the next pass's block. In order of depth they lie on a row
of as many slots as the epoch has negatives; so do the bins, each as wide as what it gives to this
epoch. A piece takes of each bin what overlaps. In order of time the pieces then take the places of
each bin's stream one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_bins import BinQuotas
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.shuffle import Ints


@dataclass(frozen=True, eq=False)
class Draws:
    """What the pieces of one epoch take: piece i takes the entries first[i] to first[i + 1].

    Pieces are numbered by time: 0 is the head, then come the runs as they are visited, and the
    last is the tail. Head and tail are empty where a pass begins or ends with a whole block.

    Attributes:
        first: int64 [pieces + 1].
        bins: the bin of each entry, ascending within a piece: int64 [entries].
        positions: the first position in the bin's stream: int64 [entries].
        counts: how many from there on: int64 [entries].
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


def epoch_draws(
    epoch: int, epochs: Epochs, shares: BinQuotas, visits: Ints, split: int, ratio: ClassRatio
) -> Draws:
    """The draws of an epoch.

    Args:
        visits: the runs of the epoch, counted from the shallow end, as they are visited: int64
            [runs].
        split: runs on the shallow side of the tail and the head.
        ratio: positives to negatives.
    """
    block = ratio.negatives_of(epochs.take)
    # Whatever part of a block's positives the tail has, the head has the rest of its negatives.
    tail = ratio.negatives_of(epochs.tail(epoch))
    before = epochs.tail(epoch - 1) if epoch else 0
    head = block - ratio.negatives_of(before) if before else 0
    runs = np.diff(epochs.edges(epoch)) * block
    time_of_run = np.empty(len(visits), np.int64)
    time_of_run[visits] = np.arange(1, len(visits) + 1)

    # In order of depth: tail and head stand together among the runs.
    pieces = np.insert(runs, split, [tail, head]).cumsum()
    pieces = np.insert(pieces, 0, 0)
    time = np.insert(time_of_run, split, [len(visits) + 1, 0])

    # Between two neighbouring cuts lies one piece and one bin.
    bin_edges = shares.edges(epoch)
    cuts = np.union1d(pieces, bin_edges)
    counts, left = np.diff(cuts), cuts[:-1]
    piece = time[np.searchsorted(pieces, left, side="right") - 1]
    bins = np.searchsorted(bin_edges, left, side="right") - 1
    by_bin = np.lexsort((piece, bins))
    taken = np.empty(len(counts), np.int64)
    taken[by_bin] = np.cumsum(counts[by_bin]) - counts[by_bin]
    positions = shares.before(epoch)[bins] + taken - bin_edges[bins]
    by_piece = np.lexsort((bins, piece))
    first = np.searchsorted(piece[by_piece], np.arange(len(time) + 1))
    return Draws(first, bins[by_piece], positions[by_piece], counts[by_piece])
