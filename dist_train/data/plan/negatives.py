"""The negatives of each depth bin as an endless stream of passes, each in a different order.

The clips of a bin lie on a circle, each on an arc as long as its weight. A pass samples n points of
the circle at equal distances of the greatest weight, as many as fit. So a pass contains a clip at
most once, and over many passes its frequency is proportional to its weight: systematic sampling
(Madow & Madow 1944). With equal weights every pass contains every clip once.

A pass consists of points T to 2T - 1, then points 2T to n - 1, then points 0 to T - 1, each of the
three parts shuffled. T is one less than the most that a step takes. Point 0 of the next pass lies
further on, but its points T to 2T - 1 do not reach the points 0 to T - 1 of this pass. So a step
that spans the end of a pass never contains a clip twice, and no pass depends on another. This
needs n >= 2T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dist_train.data.plan.shuffle import Ints, Words, permute, root_key, subkey

#: Advance of point 0 from pass to pass, as a fraction of the most that is allowed: one over the
#: golden ratio, so that the points of many passes cover the circle evenly.
ADVANCE = 618_033_988_749_894_848, 10**18


@dataclass(frozen=True, eq=False)
class NegativeStreams:
    """The streams of all bins. A *position* in a bin's stream counts from 0.

    Attributes:
        starts: bin b holds the indices starts[b] to starts[b + 1]: int64 [bins + 1].
        most: the most clips that a step takes from each bin: int64 [bins].
        seed: seed of the order.
        arcs: the end of each clip's arc, with the circles of all bins joined in one line: int64
            [count], strictly ascending. None: every arc has length 1.
        spacing: the greatest length of an arc.
    """

    starts: Ints
    most: Ints
    seed: int
    arcs: Ints | None = None
    spacing: int = 1

    @cached_property
    def rows(self) -> Ints:
        """Begin and end of each bin's circle in the line: int64 [bins + 1]."""
        if self.arcs is None:
            return self.starts
        return np.append(0, self.arcs[self.starts[1:] - 1])

    @cached_property
    def lengths(self) -> Ints:
        """Points of a pass over each bin: int64 [bins]."""
        lengths: Ints = np.diff(self.rows) // self.spacing
        return lengths

    @cached_property
    def _keys(self) -> Words:
        return subkey(root_key(self.seed, "negatives"), np.arange(len(self.most)))

    @cached_property
    def _circles(self) -> list[tuple[int, int, int]]:
        """(length of the circle, point 0 of the first pass, advance per pass) of each bin."""
        circles = []
        for key, circle, most in zip(
            self._keys.tolist(), np.diff(self.rows).tolist(), self.most.tolist(), strict=True
        ):
            room = circle - 2 * (most - 1) * self.spacing
            # Rounded up, so that the advance is not 0 while there is room.
            advance = -(-room * ADVANCE[0] // ADVANCE[1])
            circles.append((circle, key % circle, advance))
        return circles

    def take(self, bins: Ints, positions: Ints, counts: Ints) -> Ints:
        """The clips at ``counts`` positions of the streams of ``bins``, from ``positions`` on.

        Args:
            bins: int64 [n].
            positions: int64 [n].
            counts: int64 [n], each at most ``most`` of its bin.

        Returns:
            Indices of clips: int64 [sum of counts].
        """
        # A step spans the end of one pass at most, so it has a part before and a part after it.
        length = self.lengths[bins]
        number, place = np.divmod(positions, length)
        before = np.minimum(counts, length - place)
        bins, number = np.repeat(bins, 2), np.column_stack([number, number + 1]).reshape(-1)
        place = np.column_stack([place, np.zeros_like(place)]).reshape(-1)
        counts = np.column_stack([before, counts - before]).reshape(-1)
        some = np.flatnonzero(counts)
        return self._within(bins[some], number[some], place[some], counts[some])

    def _within(self, bins: Ints, numbers: Ints, places: Ints, counts: Ints) -> Ints:
        """``counts`` clips of pass ``numbers`` over ``bins``, from ``places`` on, all int64 [n]."""
        # In Python integers, because number * advance can exceed 64 bits.
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
        """The number of the point at each place of a pass: int64 [len(part)].

        Args:
            part: the entry of ``bins`` and ``keys`` that each place belongs to.
        """
        edge, length = (self.most[bins] - 1)[part], self.lengths[bins][part]
        at_start, at_end = place < edge, place >= length - edge
        third = np.where(at_start, 0, np.where(at_end, 2, 1))
        place = np.where(at_start, place, np.where(at_end, place - length + edge, place - edge))
        size = np.where(third == 1, length - 2 * edge, edge)
        first = np.where(at_start, edge, np.where(at_end, 0, 2 * edge))
        return first + permute(place, size, subkey(keys[part], third))
