"""The clips of each depth bin as an endless stream of passes, each in a different order.

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
from typing import Any

import numpy as np

from dist_train.data.plan.shuffle import Ints, Words, permute, subkey

#: Advance of point 0 from pass to pass, as a fraction of the most that is allowed: one over the
#: golden ratio, so that the points of many passes cover the circle evenly.
ADVANCE = 618_033_988_749_894_848, 10**18


@dataclass(frozen=True, eq=False)
class Streams:
    """The streams of all bins of a class. A *position* in a bin's stream counts from 0.

    Attributes:
        starts, most: see ``DepthBins``.
        key: key of the class: uint64 [1].
        arcs: the end of each clip's arc, with the circles of all bins joined in one line: int64
            [count], strictly ascending. None: every arc has length 1.
        spacing: the greatest length of an arc.
    """

    starts: Ints
    most: Ints
    key: Words
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
        return subkey(self.key, np.arange(len(self.most)))

    @cached_property
    def _origins(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Point 0 of the first pass over each bin, and its advance per pass.

        Both are arrays of Python integers, as their products can exceed 64 bits.
        """
        circles = np.diff(self.rows)
        room = (circles - 2 * (self.most - 1) * self.spacing).astype(object)
        # Rounded up, so that the advance is not 0 while there is room.
        advances = -(-room * ADVANCE[0] // ADVANCE[1])
        return (self._keys % circles.astype(np.uint64)).astype(object), advances

    def take(self, bins: Ints, positions: Ints, counts: Ints) -> Ints:
        """Indices of the clips at ``counts`` positions of the streams of ``bins``, from
        ``positions`` on: int64 [sum of counts]. A count is at most ``most`` of its bin."""
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        bins = np.repeat(bins, counts)
        numbers, places = np.divmod(np.repeat(positions, counts) + offsets, self.lengths[bins])
        points = self._points(bins, numbers, places)
        circles = np.diff(self.rows)[bins]
        first, advances = (values[bins] for values in self._origins)
        origins = ((first + numbers * advances) % circles).astype(np.int64)
        line: Ints = self.rows[bins] + (origins + points * self.spacing) % circles
        return line if self.arcs is None else np.searchsorted(self.arcs, line, side="right")

    def _points(self, bins: Ints, numbers: Ints, places: Ints) -> Ints:
        """The points at ``places`` of pass ``numbers`` over ``bins``, all int64 [n]."""
        edge, length = (self.most - 1)[bins], self.lengths[bins]
        at_start, at_end = places < edge, places >= length - edge
        part = np.where(at_start, 0, np.where(at_end, 2, 1))
        place = np.where(at_start, places, np.where(at_end, places - length + edge, places - edge))
        size = np.where(part == 1, length - 2 * edge, edge)
        first = np.where(at_start, edge, np.where(at_end, 0, 2 * edge))
        keys = subkey(subkey(self._keys[bins], numbers), part)
        return first + permute(place, size, keys)
