"""Frames to another size: area averaging along an axis that shrinks, bilinear along one that grows.

Either is linear along one axis, so a resize is a matrix for the rows and one for the columns.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from dist_train.data.types import Volume


def resize(clip: Volume, size: tuple[int, int], out: Volume | None = None) -> Volume:
    """Resize every frame of uint8 [D, H, W] to ``size`` (height, width), by OpenCV: uint8
    [D, *size].

    Returns:
        ``out``, if there is one to write to; else a new array, or the clip itself where it has that
        size.
    """
    height, width = size
    # OpenCV averages areas only if no axis grows.
    smaller = min(clip.shape[1], height), min(clip.shape[2], width)
    clip = _resized(clip, smaller, cv2.INTER_AREA, out if smaller == (height, width) else None)
    return _resized(clip, (height, width), cv2.INTER_LINEAR, out)


def _resized(clip: Volume, size: tuple[int, int], how: int, out: Volume | None) -> Volume:
    height, width = size
    if clip.shape[1:] == (height, width):
        if out is None or clip is out:
            return clip
        out[:] = clip
        return out
    if out is None:
        out = np.empty((len(clip), height, width), dtype=np.uint8)
    for source, target in zip(clip, out, strict=True):
        cv2.resize(source, (width, height), dst=target, interpolation=how)
    return out


# Crops have a few hundred heights and widths.
@lru_cache(maxsize=1024)
def resize_weights(length: int, target: int, device: torch.device) -> Tensor:
    """The matrix that resizes an axis as ``resize`` does: float32 [target, length], whose rows add
    up to 1."""
    scale = length / target
    there = torch.arange(target, device=device)[:, None]
    here = torch.arange(length, device=device)
    if target < length:
        begin, end = there * scale, (there + 1) * scale
        overlap = torch.minimum(here + 1, end) - torch.maximum(here, begin)
        return overlap.clamp(min=0) / scale
    middle = ((there + 0.5) * scale - 0.5).clamp(0, length - 1)
    return (1 - (middle - here).abs()).clamp(min=0)
