"""The positives of an epoch, in bands of like depth.

A pass puts all positives in a row by depth, shaken a little, and cuts it into blocks of ``take``.
The clips of the blocks that reach over the ends of the pass come from the middle of the row, where
neighbours differ least in depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.shuffle import Ints, below, permute, root_key, subkey

#: A window holds at most this share of the clips (and at most a block), so shaking moves a clip by
#: at most so much of the distribution of depths. On the depths of the Clog Loss challenge it costs
#: 0.002 of the padded frames.
WINDOW_SHARE = 1 / 256


@dataclass(frozen=True, eq=False)
class Bands:
    """Passes over the positives. A *place* is a position in the row of a pass, from the shallow
    end; an index is one into ``clips``."""

    clips: ByDepth
    epochs: Epochs
    seed: int

    @property
    def window(self) -> int:
        """Clips in a window, within which places are shuffled."""
        return max(2, min(self.epochs.take, int(len(self.clips) * WINDOW_SHARE)))

    @property
    def split(self) -> int:
        """Whole blocks on the shallow side of the tail and the head; as many, or one or two more,
        are on the deep side."""
        epochs = self.epochs
        return (epochs.count - epochs.take - epochs.longest_tail) // 2 // epochs.take

    def row(self, epoch: int, places: Ints) -> Ints:
        """Indices of the clips that stand at ``places`` of a pass: int64 [n].

        Two shuffles of the sorted clips: within windows, whose edges move from pass to pass, and
        then among all clips of one depth.
        """
        key, size = subkey(root_key(self.seed, "positives"), epoch), self.window
        shift = below(subkey(key, 0), size)
        number = (places + shift) // size
        first = np.maximum(number * size - shift, 0)
        last = np.minimum((number + 1) * size - shift, len(self.clips))
        mixed = first + permute(places - first, last - first, subkey(subkey(key, 1), number))

        starts = self.clips.starts
        tie = np.searchsorted(starts, mixed, side="right") - 1
        count = starts[tie + 1] - starts[tie]
        return starts[tie] + permute(
            mixed - starts[tie], count, subkey(subkey(key, 2), self.clips.depths[tie])
        )

    def blocks(self, epoch: int, first: int, last: int) -> Ints:
        """Indices of whole blocks ``first`` to ``last`` (excluded), counted from the shallow end:
        int64 [(last - first) * take]."""
        take = self.epochs.take
        places = np.arange(first * take, last * take)
        places[places >= self.split * take] += self.epochs.tail(epoch)
        # Step over the head: its i-th place has head[i] - i others of the row before it.
        head = _head_places(self, epoch)
        places += np.searchsorted(head - np.arange(len(head)), places, side="right")
        return self.row(epoch, places)

    def tail(self, epoch: int) -> Ints:
        """Indices of the clips that begin the block which the next pass completes."""
        start = self.split * self.epochs.take
        return self.row(epoch, np.arange(start, start + self.epochs.tail(epoch)))

    def head(self, epoch: int) -> Ints:
        """Indices of the clips that complete the block which the pass before began: the next ones
        after this pass's own tail that it did not begin with."""
        return self.row(epoch, _head_places(self, epoch))


# A step needs two passes at most.
@lru_cache(maxsize=8)
def _head_places(bands: Bands, epoch: int) -> Ints:
    """Places of the head, ascending.

    Of the ``take`` places after the pass's own tail, those that the tail of the pass before does
    not hold are enough, because that tail and the head together are one block. That is why a pass
    must be longer than a block by the longest tail.
    """
    epochs = bands.epochs
    count = epochs.head(epoch)
    if epoch == 0 or count == 0:
        return np.zeros(0, np.int64)
    places = bands.split * epochs.take + epochs.tail(epoch) + np.arange(epochs.take)
    fresh = ~np.isin(bands.row(epoch, places), bands.tail(epoch - 1))
    return places[fresh][:count]
