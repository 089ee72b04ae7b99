"""Augmentation on the host: a draw is applied to all frames of a clip at once.

The result is that of albumentations frame by frame, at a fraction of its time.
"""

from __future__ import annotations

import cv2
import numpy as np

from dist_train.config import AugmentSettings
from dist_train.data.augment.params import AugmentSampler, Draw, Kernel
from dist_train.data.orientation import AS_IT_IS
from dist_train.data.types import Plane, Volume

Map = np.ndarray[tuple[int, int], np.dtype[np.float32]]

# Frames that are resampled as the channels of one picture. OpenCV 5 does 4 of them in the time of
# one, with exact weights as for one; for 2, or more than 4, it rounds places to 32nds of a pixel.
TOGETHER = 4


class Augment:
    """Callable on uint8 [D, H, W]; gives an array of the same shape and dtype (H = W if rotated),
    which may be a view of it.

    Attributes:
        draw: what each clip gets.
    """

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        self.draw = AugmentSampler(settings, seed)
        self.seed = seed

    def __call__(self, clip: Volume, *, epoch: int, number: int) -> Volume:
        size = clip.shape[1], clip.shape[2]
        return augmented(clip, self.draw(size, epoch=epoch, number=number))


def augmented(clip: Volume, draw: Draw) -> Volume:
    """A clip, uint8 [D, H, W], with all of a draw done to it. The clip itself is left alone."""
    if draw.affine is not None or draw.is_displaced:
        clip = _moved(clip, draw)
    elif draw.orientation != AS_IT_IS:
        clip = np.stack([draw.orientation.apply(frame) for frame in clip])
    table = _tone_table(draw)
    if table is not None:
        clip = cv2.LUT(clip.reshape(-1, clip.shape[2]), table).reshape(clip.shape)
    if draw.kernel is not None:
        clip = _blurred(clip, draw.kernel)
    if draw.is_noisy:
        clip = _with_noise(clip, draw.pictures[-1])
    return clip[::-1] if draw.is_reversed else clip


def _moved(clip: Volume, draw: Draw) -> Volume:
    """Laid, then moved and displaced, each rounded to grey levels."""
    depth, height, width = clip.shape
    out = np.empty(clip.shape, np.uint8)
    for first in range(0, depth, TOGETHER):
        places = [min(first + i, depth - 1) for i in range(TOGETHER)]
        frames = draw.orientation.apply(cv2.merge([clip[place] for place in places]))
        if draw.affine is not None:
            frames = cv2.warpAffine(frames, draw.affine, (width, height), flags=cv2.INTER_LINEAR)
        if draw.is_displaced:
            frames = cv2.remap(frames, draw.pictures[0], draw.pictures[1], cv2.INTER_LINEAR)
        cv2.split(frames, [out[place] for place in places])
    return out


def _tone_table(draw: Draw) -> np.ndarray[tuple[int], np.dtype[np.uint8]] | None:
    """What each grey level becomes: uint8 [256]. As in albumentations each of the two steps cuts
    off what is behind the point."""
    if (draw.contrast, draw.brightness, draw.gamma) == (1.0, 0.0, 1.0):
        return None
    table = np.arange(256, dtype=np.uint8)
    if (draw.contrast, draw.brightness) != (1.0, 0.0):
        levels = np.arange(256, dtype=np.float32)
        table = np.clip(levels * draw.contrast + draw.brightness, 0, 255).astype(np.uint8)
    if draw.gamma != 1.0:
        share = np.arange(0, 256.0 / 255, 1.0 / 255)
        table = (share**draw.gamma * 255).astype(np.uint8)[table]
    return table


def _blurred(clip: Volume, kernel: Kernel) -> Volume:
    out = np.empty(clip.shape, np.uint8)
    for frame, target in zip(clip, out, strict=True):
        cv2.sepFilter2D(frame, -1, kernel, kernel, dst=target)
    return out


def _with_noise(clip: Volume, noise: Map) -> Volume:
    """The sum with noise of whole grey levels, of which what is above 0 and what is below saturate
    each."""
    more: Plane = np.clip(noise, 0, 255).astype(np.uint8)
    less: Plane = np.clip(-noise, 0, 255).astype(np.uint8)
    out = np.empty(clip.shape, np.uint8)
    for frame, target in zip(clip, out, strict=True):
        cv2.subtract(cv2.add(frame, more, dst=target), less, dst=target)
    return out
