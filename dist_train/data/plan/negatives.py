"""The negatives of each depth bin as an endless stream of passes, each in an order of its own.

The clips of a bin stand on a circle, each on an arc as long as its weight. A pass looks at n points
of the circle, each the greatest weight after the one before, as many as fit. So a pass meets a clip
at most once, and over many passes as often as its weight says: systematic sampling (Madow & Madow
1944). With equal weights it meets every clip once.

A pass begins with points T to 2T - 1, ends with points 0 to T - 1, and has the others in between,
each of the three lots shuffled. T is one less than the most that a step takes. The next pass has
its point 0 further on, but not so far that its points T to 2T - 1 come round to what this pass ends
with. So a step that reaches over the end of a pass meets no clip twice, and no pass needs to know
what another one drew. That takes n >= 2T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dist_train.data.plan.shuffle import Ints, Words, permute, root_key, subkey

#: How far a pass goes on from the one before, as a part of how far it may: one over the golden
#: ratio, so that the points of many passes come to all parts of the circle, and evenly.
ADVANCE = 618_033_988_749_894_848, 10**18


@dataclass(frozen=True, eq=False)
class Passes:
    """The streams of all bins. A *position* counts the clips of a bin's stream from 0.

    Attributes:
        starts: bin b holds the indices starts[b] to starts[b + 1]: int64 [bins + 1].
        most: the most that a step takes of each bin: int64 [bins].
        seed: keys the order.
        arcs: the end of each clip's arc, all bins' circles laid out in a row: int64 [count],
            strictly ascending. None: every arc has the length 1.
        spacing: the greatest length of an arc.
    """

    starts: Ints
    most: Ints
    seed: int
    arcs: Ints | None = None
    spacing: int = 1

    @cached_property
    def rows(self) -> Ints:
        """Where each bin's circle begins and ends in the row: int64 [bins + 1]."""
        if self.arcs is None:
            return self.starts
        return np.append(0, self.arcs[self.starts[1:] - 1])

    @cached_property
    def lengths(self) -> Ints:
        """Points of a pass of each bin: int64 [bins]."""
        lengths: Ints = np.diff(self.rows) // self.spacing
        return lengths

    @cached_property
    def _keys(self) -> Words:
        return subkey(root_key(self.seed, "negatives"), np.arange(len(self.most)))

    @cached_property
    def _circles(self) -> list[tuple[int, int, int]]:
        """Of each bin: length of the circle, point 0 of the first pass, and of the next ones."""
        circles = []
        for key, circle, most in zip(
            self._keys.tolist(), np.diff(self.rows).tolist(), self.most.tolist(), strict=True
        ):
            room = circle - 2 * (most - 1) * self.spacing
            # Upward, so that also the least room is used.
            advance = -(-room * ADVANCE[0] // ADVANCE[1])
            circles.append((circle, key % circle, advance))
        return circles

    def take(self, bins: Ints, positions: Ints, counts: Ints) -> Ints:
        """What stands at ``counts`` positions of each of ``bins``, from ``positions`` on.

        Args:
            bins: int64 [n].
            positions: int64 [n].
            counts: int64 [n], each at most what a step takes of that bin.

        Returns:
            Indices of clips: int64 [sum of counts].
        """
        # A step reaches over the end of one pass at most: the part before it, and the part after.
        length = self.lengths[bins]
        number, place = np.divmod(positions, length)
        before = np.minimum(counts, length - place)
        bins, number = np.repeat(bins, 2), np.column_stack([number, number + 1]).reshape(-1)
        place = np.column_stack([place, np.zeros_like(place)]).reshape(-1)
        counts = np.column_stack([before, counts - before]).reshape(-1)
        some = np.flatnonzero(counts)
        return self._within(bins[some], number[some], place[some], counts[some])

    def _within(self, bins: Ints, numbers: Ints, places: Ints, counts: Ints) -> Ints:
        """The clips of pass ``numbers`` of ``bins``, ``counts`` of them from ``places`` on."""
        # In whole numbers of Python, because numbers * advance can exceed 64 bits.
        origins = np.array(
            [
                (first + number * advance) % circle
                for number, (circle, first, advance) in zip(
                    numbers.tolist(), (self._circles[b] for b in bins.tolist()), strict=True
                )
            ],
            np.int64,
        )
        part = np.repeat(np.arange(len(bins)), counts)
        place = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts - places, counts)
        point = self._point(part, place, bins, subkey(self._keys[bins], numbers))
        rows = self.rows[bins][part]
        circle = np.diff(self.rows)[bins][part]
        row = rows + (origins[part] + point * self.spacing) % circle
        return row if self.arcs is None else np.searchsorted(self.arcs, row, side="right")

    def _point(self, part: Ints, place: Ints, bins: Ints, keys: Words) -> Ints:
        """The number of the point that stands at each place of a pass."""
        edge, length = (self.most[bins] - 1)[part], self.lengths[bins][part]
        start, end = place < edge, place >= length - edge
        lot = np.where(start, 0, np.where(end, 2, 1))
        place = np.where(start, place, np.where(end, place - length + edge, place - edge))
        size = np.where(lot == 1, length - 2 * edge, edge)
        first = np.where(start, edge, np.where(end, 0, 2 * edge))
        return first + permute(place, size, subkey(keys[part], lot))
