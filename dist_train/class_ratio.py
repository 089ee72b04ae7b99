"""How many positives and negatives go together."""

from __future__ import annotations

from typing import Annotated, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Count = TypeVar("Count", int, NDArray[np.int64])

#: At least one of each class; the upper bound catches a slip of the keyboard.
Clips = Annotated[int, Field(ge=1, le=1024)]


class ClassRatio(NamedTuple):
    """Positives and negatives of one group, the smallest piece of a batch of that ratio."""

    positives: Clips
    negatives: Clips

    def __repr__(self) -> str:
        # Fingerprints of plans were made of the plain pair.
        return repr(tuple(self))

    @property
    def group(self) -> int:
        """Clips of a group."""
        return self.positives + self.negatives

    @property
    def positive_rate(self) -> float:
        """Share of positives among the clips of a batch."""
        return self.positives / self.group

    def negatives_of(self, positives: Count) -> Count:
        """Negatives beside so many positives, rounded down; of a number or an array."""
        return positives * self.negatives // self.positives
