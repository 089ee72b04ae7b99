"""Pixels of every dtype: what white is, and changes of each channel in grey levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dist_train.data.types import Volume

#: The value of each dtype that means 1, white.
WHITE: dict[Any, float] = {
    torch.uint8: 255.0,
    torch.uint16: 65535.0,
    torch.float16: 1.0,
    torch.float32: 1.0,
    "uint8": 255.0,
    "uint16": 65535.0,
    "float16": 1.0,
}


def change_channels(clip: Volume, change: Callable[[Volume], Volume]) -> Volume:
    """Apply ``change`` to each channel of a clip; returns an array of the clip's shape and dtype.

    ``change`` gets uint8 [D, H, W] as it is, and other dtypes as float32 [D, H, W] in grey levels:
    0 black and 255 white, not rounded. It returns the same dtype.
    """
    if clip.ndim == 4:
        channels = np.moveaxis(clip, 3, 0)
        return np.stack(
            [change_channels(np.ascontiguousarray(channel), change) for channel in channels],
            axis=-1,
        )
    if clip.dtype == np.uint8:
        return change(clip)
    scale = np.float32(WHITE[clip.dtype.name] / 255)
    levels = change(clip.astype(np.float32) / scale)
    return as_dtype(levels * scale, clip.dtype)


def as_dtype(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Round float32 to a dtype; integers are clipped to their range."""
    if dtype.kind == "u":
        values = np.rint(values).clip(0, np.iinfo(dtype).max)
    return values.astype(dtype)
