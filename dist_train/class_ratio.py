"""The ratio of positives to negatives."""

from __future__ import annotations

from typing import Annotated, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Count = TypeVar("Count", int, NDArray[np.int64])

#: At least one of each class; the upper bound catches typing errors.
Clips = Annotated[int, Field(ge=1, le=1024)]


class ClassRatio(NamedTuple):
    """Positives and negatives of one group, the smallest batch of that ratio."""

    positives: Clips
    negatives: Clips

    def __repr__(self) -> str:
        # Fingerprints of plans contain the plain pair.
        return repr(tuple(self))

    @property
    def group(self) -> int:
        """Number of clips in a group."""
        return self.positives + self.negatives

    @property
    def positive_rate(self) -> float:
        """Share of positives among the clips of a batch."""
        return self.positives / self.group

    def negatives_of(self, positives: Count) -> Count:
        """Number of negatives for a number (or an array of numbers) of positives, rounded down."""
        return positives * self.negatives // self.positives
