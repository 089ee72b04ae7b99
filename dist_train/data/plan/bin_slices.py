"""The slices of the bins' streams that each piece of an epoch takes.

The pieces of an epoch are the head (completes the previous pass's block), the runs of whole blocks,
and the tail (begins the next pass's block). A class's clips of the epoch form a row of slots in
order of depth. The pieces divide that row, and so do the bins, by their quotas. A piece takes from
each bin the slots in which the two overlap. In order of time, the pieces then take consecutive
positions of each bin's stream.
"""

from __future__ import annotations

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_bins import BinQuotas
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.shuffle import Ints

#: What a piece takes from its bins: the bins, ascending; the first position in the stream of each;
#: and the number of clips from there on. int64 [n] each.
BinSlice = tuple[Ints, Ints, Ints]


def epoch_slices(
    epoch: int,
    epochs: Epochs,
    quotas: BinQuotas,
    visits: Ints,
    split: int,
    ratio: ClassRatio,
    number: int,
) -> list[BinSlice]:
    """A class's slices of the pieces of an epoch, in order of time: the head, the runs, the tail.

    Head and tail are empty if the pass begins or ends with a whole block.

    Args:
        visits: the runs, numbered from the shallow end, in order of time: int64 [runs].
        split: number of runs on the shallow side of the tail and the head.
        number: number of the class, not of the anchor, in ``ratio``.
    """
    block = ratio.of(number, epochs.per_block)
    # The tail takes its share of the block, rounded down; the head takes the rest.
    tail, before = (ratio.of(number, epochs.tail(of_epoch)) for of_epoch in (epoch, epoch - 1))
    head = block - before if epochs.head(epoch) else 0
    # In order of depth the tail and the head lie side by side between two runs.
    sizes = np.insert(np.diff(epochs.edges(epoch)) * block, split, [tail, head])
    time = np.insert(np.argsort(visits) + 1, split, [len(visits) + 1, 0])

    # Between two neighbouring cuts there is one piece and one bin.
    pieces, bin_edges = np.append(0, np.cumsum(sizes)), quotas.edges(epoch)
    cuts = np.union1d(pieces, bin_edges)
    counts, left = np.diff(cuts), cuts[:-1]
    piece = time[np.searchsorted(pieces, left, side="right") - 1]
    bins = np.searchsorted(bin_edges, left, side="right") - 1
    by_bin = np.lexsort((piece, bins))
    taken = np.empty(len(counts), np.int64)
    taken[by_bin] = np.cumsum(counts[by_bin]) - counts[by_bin]
    positions = quotas.before(epoch)[bins] + taken - bin_edges[bins]
    by_piece = np.lexsort((bins, piece))
    ends = np.searchsorted(piece[by_piece], np.arange(1, len(time)))
    arrays = (np.split(array[by_piece], ends) for array in (bins, positions, counts))
    return list(zip(*arrays, strict=True))
