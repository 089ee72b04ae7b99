"""Frames of clips as pictures for people: grey, or in colour."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dist_train.data.augment.levels import WHITE, as_dtype

RGB = ("red", "green", "blue")
#: Frames of a strip, and their largest height.
FRAMES, HEIGHT = 8, 128


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


def film_strip(clip: np.ndarray, channels: Sequence[str]) -> tuple[np.ndarray, int]:
    """Evenly spaced frames side by side, uint8 [H, W] or [H, W, 3] as ``as_picture`` gives them,
    and how many they are. Large frames are shrunk.

    Args:
        clip: native frames, [D, H, W] or [D, H, W, C].
    """
    shown = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(np.int64))
    height, width = clip.shape[1:3]
    scale = min(1.0, HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pictures = as_picture(clip[shown], channels)
    frames = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures]
    white = (255, 255, 255)
    gaps = [cv2.copyMakeBorder(f, 0, 0, 2, 0, cv2.BORDER_CONSTANT, value=white) for f in frames]
    return np.hstack(gaps)[:, 2:], len(shown)


def stacked(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below each other, with white gaps; narrow ones are black at the right.

    Args:
        strips: at least one; all uint8 [H, W] or all [H, W, 3].

    Returns:
        uint8 [sum of H + gaps, largest W] or [..., 3].
    """
    width = max(strip.shape[1] for strip in strips)
    rows: list[np.ndarray] = []
    for strip in strips:
        edges = [(0, 0), (0, width - strip.shape[1])] + [(0, 0)] * (strip.ndim - 2)
        rows += [np.full((2, width, *strip.shape[2:]), 255, np.uint8), np.pad(strip, edges)]
    return np.concatenate(rows[1:])


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
