"""The augmentation of the original recipe (``augment.preset: original``), on the CPU.

The original applied albumentations of 2020 to a picture with the frames as channels. So all frames
are moved, toned and blurred alike, and each has its own noise. Blocks, order and ranges are the
same. Each block draws one of its transforms, all equally likely (docs/augmentation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import Frames, Map, change_each, change_together, mapped
from dist_train.data.augment.levels import change_channels
from dist_train.data.orientation import IDENTITY, Matrix, Orientation
from dist_train.data.types import Plane, Volume

Maps = tuple[Map, Map]
Blur = tuple[Literal["gaussian", "box"], int]
#: (height, width).
Size = tuple[int, int]

# Limits of the changes, in both directions.
SHIFT, SCALE, DEGREES = 0.1, 0.2, 10.0
BRIGHTNESS, CONTRAST, GAMMA = 0.2, 0.2, (0.8, 1.2)
TAPS = (3, 5, 7)
#: The first Gaussian noise is given by its variance, the second by its standard deviation, both in
#: grey levels.
VARIANCE, DEVIATION = (10.0, 50.0), (0.01 * 255, 0.05 * 255)
FACTOR = (0.5, 1.5)
ELASTIC_ALPHA, ELASTIC_SIGMA, ELASTIC_AFFINE = 120.0, 7.5, 3.6
GRID_STEPS, GRID_LIMIT = 5, 0.3
OPTICAL_LIMIT, OPTICAL_SHIFT = 1.0, 3.6


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise that differs in each frame, from the seed ``key``: Gaussian of standard deviation
    ``scale``, in grey levels, or uniform factors within ``FACTOR``."""

    kind: Literal["added", "multiplied"]
    scale: float
    key: int


@dataclass(frozen=True, slots=True)
class OriginalDraw:
    """The changes of a clip, in the order of application.

    Attributes:
        orientation, contrast, brightness, gamma, is_reversed: see ``params.Draw``.
        blur: ("gaussian" or "box", taps); None does not blur.
        elastic: float64 [2, 3], the affine map before an elastic displacement; outside, the picture
            is mirrored.
        displaced: (x, y) of the source position of each pixel, float32 [H, W] each; outside, the
            picture is mirrored.
        affine: float64 [2, 3], shift, scale and rotation; outside is black.
    """

    orientation: Orientation = IDENTITY
    contrast: float = 1.0
    brightness: float = 0.0
    gamma: float = 1.0
    blur: Blur | None = None
    noise: Noise | None = None
    elastic: Matrix | None = None
    displaced: Maps | None = None
    affine: Matrix | None = None
    is_reversed: bool = False


class OriginalAugment:
    """Augments clips with the interface of ``Augment``. The clip itself does not change."""

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def __call__(self, clip: Volume, *, epoch: int, number: int) -> Volume:
        return applied(clip, self.draw((clip.shape[1], clip.shape[2]), epoch=epoch, number=number))

    def draw(self, size: Size, *, epoch: int, number: int) -> OriginalDraw:
        """The draw for clip ``number`` in an epoch, for frames of ``size`` (height, width)."""
        s = self.settings
        random = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, number)))

        def happens(probability: float) -> bool:
            return bool(random.random() < probability)

        orientation = IDENTITY.flipped(columns=happens(s.flip))
        orientation = orientation.flipped(rows=happens(s.flip))
        if happens(s.rotate90):
            orientation = orientation.turned(int(random.integers(4)))
        contrast, brightness, gamma = 1.0, 0.0, 1.0
        if happens(s.brightness):
            if happens(0.5):
                contrast = random.uniform(1 - CONTRAST, 1 + CONTRAST)
                brightness = 255 * random.uniform(-BRIGHTNESS, BRIGHTNESS)
            else:
                gamma = random.uniform(*GAMMA)
        blur, noise = _draw_blur_or_noise(random) if happens(s.blur_noise) else (None, None)
        elastic, displaced = _draw_distortion(random, size) if happens(s.distort) else (None, None)
        affine = _draw_affine(random, size) if happens(s.shift_scale_rotate) else None
        moved = elastic, displaced, affine, happens(s.reverse)
        return OriginalDraw(orientation, contrast, brightness, gamma, blur, noise, *moved)


def _draw_blur_or_noise(random: np.random.Generator) -> tuple[Blur | None, Noise | None]:
    kind = random.integers(5)
    if kind < 2:
        return ("gaussian" if kind == 0 else "box", int(random.choice(TAPS))), None
    key = int(random.integers(2**63))
    if kind == 2:
        return None, Noise("added", float(random.uniform(*VARIANCE) ** 0.5), key)
    if kind == 3:
        return None, Noise("added", float(random.uniform(*DEVIATION)), key)
    return None, Noise("multiplied", 0.0, key)


def _draw_distortion(random: np.random.Generator, size: Size) -> tuple[Matrix | None, Maps]:
    """The affine map of an elastic deformation, else None; and the displacement."""
    kind = random.integers(3)
    if kind == 0:
        return _elastic(random, size)
    return None, (_grid if kind == 1 else _optical)(random, size)


def _elastic(random: np.random.Generator, size: Size) -> tuple[Matrix, Maps]:
    """Elastic deformation (Simard et al. 2003): an affine map that moves three corners of a square,
    then a smooth random field."""
    height, width = size
    middle, reach = np.array([width // 2, height // 2]), min(size) // 3
    corners = (middle + reach * np.array([(1, 1), (1, -1), (-1, -1)])).astype(np.float32)
    away = random.uniform(-ELASTIC_AFFINE, ELASTIC_AFFINE, corners.shape).astype(np.float32)
    taps = 2 * int(4 * ELASTIC_SIGMA + 0.5) + 1

    def field() -> np.ndarray:
        rough, mirror = random.uniform(-1, 1, size), cv2.BORDER_REFLECT
        smooth = cv2.GaussianBlur(rough, (taps, taps), ELASTIC_SIGMA, borderType=mirror)
        return ELASTIC_ALPHA * np.asarray(smooth)

    x, y = np.arange(width) + field(), np.arange(height)[:, None] + field()
    maps = x.astype(np.float32), y.astype(np.float32)
    return cv2.getAffineTransform(corners, corners + away), maps


def _grid(random: np.random.Generator, size: Size) -> Maps:
    """Grid distortion: the rows and the columns of a grid change their widths independently."""
    x, y = (_stretched(random, length) for length in (size[1], size[0]))
    columns, rows = np.meshgrid(x, y)
    return columns.astype(np.float32), rows.astype(np.float32)


def _stretched(random: np.random.Generator, length: int) -> np.ndarray:
    """The source position of each pixel of an axis: float64 [length]."""
    step = max(length // GRID_STEPS, 1)
    parts, reached = [], 0.0
    for first in range(0, length, step):
        stretch = random.uniform(1 - GRID_LIMIT, 1 + GRID_LIMIT)
        # An incomplete last cell ends at the edge.
        whole = first + step <= length
        end = reached + step * stretch if whole else float(length)
        parts.append(np.linspace(reached, end, min(step, length - first)))
        reached = end
    return np.concatenate(parts)


def _optical(random: np.random.Generator, size: Size) -> Maps:
    """Optical distortion: OpenCV's radial model with equal coefficients. The lens's shifted centre
    moves to the centre of the picture."""
    height, width = size
    k = random.uniform(-OPTICAL_LIMIT, OPTICAL_LIMIT)
    dx, dy = np.rint(random.uniform(-OPTICAL_SHIFT, OPTICAL_SHIFT, 2))
    camera = np.array([[width, 0, width / 2 + dx], [0, height, height / 2 + dy], [0, 0, 1]])
    lens = np.array([k, k, 0, 0, 0])
    seen = cv2.getDefaultNewCameraMatrix(camera, (width, height), centerPrincipalPoint=True)
    maps = cv2.initUndistortRectifyMap(camera, lens, np.eye(3), seen, (width, height), cv2.CV_32F)
    return maps[0], maps[1]


def _draw_affine(random: np.random.Generator, size: Size) -> Matrix:
    height, width = size
    angle = random.uniform(-DEGREES, DEGREES)
    scale = random.uniform(1 - SCALE, 1 + SCALE)
    matrix: Matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    matrix[:, 2] += random.uniform(-SHIFT, SHIFT, 2) * (width, height)
    return matrix


def applied(clip: Volume, draw: OriginalDraw) -> Volume:
    """Apply a draw to each channel of a clip, which itself does not change.

    uint8 is truncated to grey levels after each change, other dtypes are rounded at the end.
    """
    return change_channels(clip, lambda channel: _applied(channel, draw))


def _applied(clip: Volume, draw: OriginalDraw) -> Volume:
    """Apply a draw to uint8 or float32 levels, [D, H, W]."""
    if draw.orientation != IDENTITY:
        clip = np.stack([draw.orientation.apply(frame) for frame in clip])
    if (draw.contrast, draw.brightness) != (1.0, 0.0):
        clip = _toned(clip, lambda levels: levels * draw.contrast + draw.brightness)
    if draw.gamma != 1.0:
        clip = _toned(clip, lambda levels: 255 * (levels / 255) ** draw.gamma)
    if draw.blur is not None:
        clip = _blurred(clip, *draw.blur)
    if draw.noise is not None:
        clip = _with_noise(clip, draw.noise)
    if draw.displaced is not None or draw.affine is not None:
        clip = _resampled(clip, draw)
    return clip[::-1] if draw.is_reversed else clip


def _toned(clip: Volume, change: Callable[[np.ndarray], np.ndarray]) -> Volume:
    """A new clip, in which each grey level is changed."""
    if clip.dtype == np.uint8:
        return mapped(clip, _grey(change(np.arange(256, dtype=np.float64)), clip.dtype))
    return _grey(change(clip), clip.dtype)


def _grey(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Clip to 0 to 255; truncate to whole grey levels if ``dtype`` is uint8."""
    clipped: np.ndarray = np.clip(values, 0, 255)
    return clipped.astype(dtype)


def _blurred(clip: Volume, kind: str, taps: int) -> Volume:
    size = taps, taps
    if kind == "box":
        return change_each(clip, lambda frame, out: cv2.blur(frame, size, dst=out))
    # OpenCV computes sigma from the taps.
    return change_each(clip, lambda frame, out: cv2.GaussianBlur(frame, size, 0, dst=out))


def _with_noise(clip: Volume, noise: Noise) -> Volume:
    """Add or multiply noise, drawn anew for each frame."""
    random = np.random.default_rng(noise.key)

    def change(frame: Plane, out: Plane) -> None:
        if noise.kind == "added":
            drawn = random.standard_normal(frame.shape, np.float32)
            values = frame + np.float32(noise.scale) * drawn
        else:
            low, high = FACTOR
            drawn = random.random(frame.shape, np.float32)
            values = frame * (np.float32(low) + np.float32(high - low) * drawn)
        out[:] = _grey(values, out.dtype)

    return change_each(clip, change)


def _resampled(clip: Volume, draw: OriginalDraw) -> Volume:
    """Apply the distortion, then the affine map, each rounded to the clip's dtype."""
    size, border = (clip.shape[2], clip.shape[1]), cv2.BORDER_REFLECT_101

    def resample(frames: Frames) -> Frames:
        if draw.elastic is not None:
            frames = cv2.warpAffine(frames, draw.elastic, size, borderMode=border)
        if draw.displaced is not None:
            frames = cv2.remap(frames, *draw.displaced, cv2.INTER_LINEAR, borderMode=border)
        return frames if draw.affine is None else cv2.warpAffine(frames, draw.affine, size)

    return change_together(clip, resample)
