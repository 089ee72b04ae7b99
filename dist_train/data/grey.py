"""Values of any depth and range -> uint8 grey, 0 black and 255 white."""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def levels(bits: int, *, full_range: bool) -> np.ndarray:
    """The grey of each coded value: uint8 [2 ** bits].

    Full range keeps the 8 highest bits, which gives back every grey level that was written with
    more bits, whether the writer filled up with zeros or repeated the highest ones. Limited range
    (ITU-R BT.601 and BT.709) has black at 16 and white at 235 of 8 bits, and is stretched.
    """
    values = np.arange(1 << bits)
    if full_range:
        return np.asarray(values >> (bits - 8), np.uint8)
    black, white = (level << (bits - 8) for level in (16, 235))
    stretched = np.rint((values - black) * (255 / (white - black)))
    return np.asarray(np.clip(stretched, 0, 255), np.uint8)


#: Limited range of 8 bits, stretched.
FULL_RANGE = levels(8, full_range=False)
