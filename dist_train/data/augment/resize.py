"""Resize frames: area averaging along axes that shrink, bilinear along axes that grow.

Both are linear along one axis, so a resize is one matrix for the rows and one for the columns.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from dist_train.data.types import Volume


def resize(clip: Volume, size: tuple[int, int], out: Volume | None = None) -> Volume:
    """Resize every frame of a clip to ``size`` (height, width) by OpenCV, rounded to its dtype.

    Channels are resized one by one: OpenCV rounds two together differently, and refuses five.

    Returns ``out``, of the clip's dtype, if given; else a new array, or the clip if it has that
    size.
    """
    height, width = size
    if clip.ndim == 4 and clip.shape[1:3] != (height, width):
        channels = [resize(np.ascontiguousarray(c), size) for c in np.moveaxis(clip, 3, 0)]
        return np.stack(channels, axis=-1, out=out)
    if clip.dtype == np.float16 and clip.shape[1:3] != (height, width):
        # OpenCV does not resize float16.
        resized = resize(clip.astype(np.float32), size).astype(np.float16)
        return resized if out is None else _copied(resized, out)
    # OpenCV averages areas only if no axis grows, so shrink first.
    smaller = min(clip.shape[1], height), min(clip.shape[2], width)
    clip = _resized(clip, smaller, cv2.INTER_AREA, out if smaller == (height, width) else None)
    return _resized(clip, (height, width), cv2.INTER_LINEAR, out)


def _resized(clip: Volume, size: tuple[int, int], how: int, out: Volume | None) -> Volume:
    height, width = size
    if clip.shape[1:3] == (height, width):
        return clip if out is None or clip is out else _copied(clip, out)
    if out is None:
        out = np.empty((len(clip), height, width), clip.dtype)
    for source, target in zip(clip, out, strict=True):
        cv2.resize(source, (width, height), dst=target, interpolation=how)
    return out


def _copied(clip: Volume, out: Volume) -> Volume:
    out[:] = clip
    return out


# Crops have a few hundred heights and widths.
@lru_cache(maxsize=1024)
def resize_weights(length: int, target: int, device: torch.device) -> Tensor:
    """The matrix that resizes an axis like ``resize``: float32 [target, length]; rows sum to 1."""
    scale = length / target
    output = torch.arange(target, device=device)[:, None]
    source = torch.arange(length, device=device)
    if target < length:
        begin, end = output * scale, (output + 1) * scale
        overlap = torch.minimum(source + 1, end) - torch.maximum(source, begin)
        return overlap.clamp(min=0) / scale
    centre = ((output + 0.5) * scale - 0.5).clamp(0, length - 1)
    return (1 - (centre - source).abs()).clamp(min=0)
