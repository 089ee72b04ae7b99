"""What a volume file holds, before it becomes uint8 grey."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RawVolume:
    """``array``: values as they lie in the file, [D, H, W], or [D, H, W, 3 or 4] in colour.
    ``bits``: depth of values that are kept in 16 bits, where metadata tell it."""

    array: np.ndarray
    bits: int | None = None

    @property
    def is_deep(self) -> bool:
        """Whether its values are kept in 16 bits."""
        return self.array.dtype.newbyteorder("=") == np.uint16
