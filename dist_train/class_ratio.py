"""The ratio of classes in a batch."""

from __future__ import annotations

from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Count = TypeVar("Count", int, NDArray[np.int64])

#: At least one of each class; the upper bound catches typing errors.
Clips = Annotated[int, Field(ge=1, le=1024)]


class ClassRatio(tuple[int, ...]):
    """Clips of each class in a group, the smallest batch of that ratio.

    The first class is the anchor: an epoch is one pass over its clips. Fingerprints of plans
    contain the plain tuple.
    """

    __slots__ = ()

    @property
    def group(self) -> int:
        """Number of clips in a group."""
        return sum(self)

    def of(self, number: int, anchors: Count) -> Count:
        """Clips of class ``number`` for a number (or an array of numbers) of clips of the anchor,
        rounded down."""
        return anchors * self[number] // self[0]
