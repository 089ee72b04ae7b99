"""Frames of clips as pictures for people: grey, or in colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_train.data.augment.levels import WHITE, as_dtype

RGB = ("red", "green", "blue")


def as_picture(frames: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """uint8 [N, H, W] of one channel; of several, their first three as the red, green and blue of
    [N, H, W, 3].

    Args:
        frames: of a stored dtype, or float32 of 0 to 1: [N, H, W], or [N, H, W, C].
    """
    if frames.ndim == 4:
        shown = frames[..., [channels.index(name) for name in _shown(channels)]]
        lacking = max(0, 3 - shown.shape[3])
        frames = np.pad(shown, ((0, 0), (0, 0), (0, 0), (0, lacking)))
    if frames.dtype == np.uint8:
        return frames
    scale = 255 / WHITE.get(frames.dtype.name, 1.0)
    return as_dtype(frames.astype(np.float32) * np.float32(scale), np.dtype(np.uint8))


def legend(channels: Sequence[str]) -> str:
    """Which channels the colours of a picture are, as "dapi red, gfp green"; empty if that is
    plain."""
    shown = _shown(channels)
    told = [f"{name} {colour}" for name, colour in zip(shown, RGB, strict=False)]
    if len(channels) == 1 or tuple(name.lower() for name in shown) == RGB:
        told = []
    if len(channels) > len(shown):
        told.append(f"{len(channels) - len(shown)} more not shown")
    return ", ".join(told)


def _shown(channels: Sequence[str]) -> list[str]:
    lower = [name.lower() for name in channels]
    if set(RGB) <= set(lower):
        return [channels[lower.index(colour)] for colour in RGB]
    return list(channels[:3])
