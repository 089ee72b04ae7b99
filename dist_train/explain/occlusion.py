"""What is lost when a part of a clip is hidden (Zeiler & Fergus 2014)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

#: Deeper clips are hidden by several frames at a time, in this many parts.
MOST_PARTS = 32
#: Places of the square along height and along width; its side is a quarter of the frame's.
PLACES, SIDE = 7, 4

#: Gives what is lost of a clip's probability, or score, if it is [1, C, D, H, W] instead.
Lost = Callable[[Tensor], float]


@torch.no_grad()
def hidden_frames(clip: Tensor, lost: Lost) -> np.ndarray:
    """What is lost when each frame is replaced by the mean frame: float64 [D]."""
    depth = clip.shape[2]
    mean, found = clip.mean(2, keepdim=True), np.empty(depth)
    for part in np.array_split(np.arange(depth), min(depth, MOST_PARTS)):
        hidden = clip.clone()
        hidden[:, :, part[0] : part[-1] + 1] = mean
        found[part] = lost(hidden)
    return found


@torch.no_grad()
def hidden_places(clip: Tensor, lost: Lost) -> np.ndarray:
    """What is lost when a square is replaced by the clip's mean in all frames: the mean over the
    squares that hide a pixel, float64 [H, W]."""
    height, width = clip.shape[3:]
    mean = clip.mean((2, 3, 4), keepdim=True)
    sides = -(-height // SIDE), -(-width // SIDE)
    total, squares = np.zeros((height, width)), np.zeros((height, width))
    tops, lefts = (
        np.unique(np.linspace(0, size - side, PLACES).round().astype(int))
        for size, side in zip((height, width), sides, strict=True)
    )
    for top, left in product(tops.tolist(), lefts.tolist()):
        square = slice(top, top + sides[0]), slice(left, left + sides[1])
        hidden = clip.clone()
        hidden[:, :, :, *square] = mean
        total[square] += lost(hidden)
        squares[square] += 1
    return total / squares
