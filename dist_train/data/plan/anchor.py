"""The anchor's clips of an epoch, in blocks of similar depth.

A pass sorts all of them into a row by depth, shuffles neighbours a little, and cuts the row into
blocks. A block that spans the end of a pass takes its clips from the middle of the row, where
neighbours differ least in depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.shuffle import Ints, permute, root_key, subkey

#: A window holds at most this share of the clips, and at most a block. So shuffling moves a clip by
#: at most this quantile of the depths. On the depths of the Clog Loss challenge that adds 0.002 of
#: the padded frames.
WINDOW_SHARE = 1 / 256


@dataclass(frozen=True, eq=False)
class AnchorOrder:
    """The order of the anchor's clips in each pass. A *place* is a position in the row of a pass,
    from the shallow end."""

    clips: ByDepth
    epochs: Epochs
    seed: int

    @property
    def window(self) -> int:
        """Clips of a window, within which places are shuffled."""
        return max(2, min(self.epochs.per_block, int(len(self.clips) * WINDOW_SHARE)))

    @property
    def split(self) -> int:
        """Whole blocks on the shallow side of the tail and the head. The deep side has as many, or
        one or two more."""
        epochs = self.epochs
        return (epochs.count - epochs.per_block - epochs.longest_tail) // 2 // epochs.per_block

    def row(self, epoch: int, places: Ints) -> Ints:
        """Indices of the clips at ``places`` of a pass: int64 [n].

        The sorted clips are shuffled twice: within windows, whose edges change with the pass, then
        among all clips of one depth.
        """
        # Names of keys are part of the order: they date from plans of two classes.
        key, size = subkey(root_key(self.seed, "positives"), epoch), self.window
        shift = int(subkey(key, 0)[0]) % size
        number = (places + shift) // size
        first = np.maximum(number * size - shift, 0)
        last = np.minimum((number + 1) * size - shift, len(self.clips))
        mixed = first + permute(places - first, last - first, subkey(subkey(key, 1), number))

        starts = self.clips.starts
        tie = np.searchsorted(starts, mixed, side="right") - 1
        keys = subkey(subkey(key, 2), self.clips.depths[tie])
        return starts[tie] + permute(mixed - starts[tie], starts[tie + 1] - starts[tie], keys)

    def blocks(self, epoch: int, first: int, last: int) -> Ints:
        """Indices of whole blocks ``first`` to ``last`` (excluded), from the shallow end."""
        per_block = self.epochs.per_block
        places = np.arange(first * per_block, last * per_block)
        places[places >= self.split * per_block] += self.epochs.tail(epoch)
        # Skip the places of the head: before its i-th place lie head[i] - i other places.
        head = _head_places(self, epoch)
        places += np.searchsorted(head - np.arange(len(head)), places, side="right")
        return self.row(epoch, places)

    def tail(self, epoch: int) -> Ints:
        """Indices of the clips that begin the block that the next pass completes."""
        start = self.split * self.epochs.per_block
        return self.row(epoch, np.arange(start, start + self.epochs.tail(epoch)))

    def head(self, epoch: int) -> Ints:
        """Indices of the clips that complete the block that the previous pass began."""
        return self.row(epoch, _head_places(self, epoch))


# A step needs two passes at most.
@lru_cache(maxsize=8)
def _head_places(order: AnchorOrder, epoch: int) -> Ints:
    """Places of the head, ascending.

    They are chosen from the ``per_block`` places after the pass's own tail, without clips of the
    previous tail. Enough remain, as that tail and the head make one block. Hence a pass must be as
    long as a block and the longest tail.
    """
    epochs = order.epochs
    count = epochs.head(epoch)
    if count == 0:
        return np.zeros(0, np.int64)
    places = order.split * epochs.per_block + epochs.tail(epoch) + np.arange(epochs.per_block)
    fresh = ~np.isin(order.row(epoch, places), order.tail(epoch - 1))
    return places[fresh][:count]
