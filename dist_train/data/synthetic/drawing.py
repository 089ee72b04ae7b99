"""Draw synthetic capillary videos in the form of the Clog Loss challenge.

Every clip shows a dark, noisy two-photon background, a few other vessels, and a target vessel
inside a closed orange outline. Only motion tells the classes apart: the cell shadows of a flowing
vessel travel along it, those of a stalled vessel do not.

Neither a single frame nor the mean frame tells them apart:

- A cell is in focus for about ten frames, and others follow. When and where shadows appear, and how
  dark they are, has the same distribution in both classes. In a flowing vessel all shadows are
  displaced together, on a circle as long as the vessel, from a uniform first position: the
  distribution of a single frame is the same.
- Successive cells are a golden section apart, so that they fill the vessel evenly with or without
  travel, and the mean over the frames is nearly flat. Matter that adheres to the wall, in a number
  that differs from clip to clip, hides what remains.
- Every frame is compressed by itself, so it shows nothing of its neighbours.

Random draws do not depend on the label: the pixels are a function of (seed, index, label).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from dist_train.data.raw.outline import Box
from dist_train.data.synthetic.challenge_stats import (
    BOX_HEIGHT,
    BOX_WIDTH,
    CLIPS_BY_DEPTH,
    FRAME_SIZES,
    OUTLINE_COLOUR,
    OUTLINE_WIDTH,
)

# One independent stream of random numbers for each purpose.
SHAPE, PICTURE, METADATA, LABEL = range(4)

_DEPTHS: Final = np.array(list(CLIPS_BY_DEPTH))
_DEPTH_SHARES: Final = np.array(list(CLIPS_BY_DEPTH.values())) / sum(CLIPS_BY_DEPTH.values())
_NARROW_SHARE: Final = 0.1
# The logarithms of a box's height and width are normal: a common size, plus and minus an aspect.
_SIZE_SIGMA: Final = 0.35
_ASPECT_SIGMA: Final = 0.27
# Pixels between box and frame, so that the drifting outline is never cut.
_EDGE: Final = 8

_NOISE: Final = 4.5
# The noise tile is larger than a frame by this, in both directions.
_TILE_MARGIN: Final = 256
_GOLDEN_SECTION: Final = (5**0.5 - 1) / 2
# Points along a vessel at which its shadows are computed.
_STATIONS: Final = 256


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """The shape of one clip: sizes in pixels, ``depth`` in frames."""

    seed: int
    index: int
    depth: int
    frame_height: int
    frame_width: int
    box: Box


@dataclass(frozen=True, slots=True)
class Clip:
    """A drawn clip before compression.

    ``frames``: RGB uint8 [D, H, W, 3]. ``boxes``: the true box of the outline in each frame.
    """

    frames: np.ndarray
    boxes: list[Box]


def random_stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of a clip for one purpose, such as ``SHAPE``."""
    return np.random.default_rng([seed, index, purpose])


def draw_clip(seed: int, index: int) -> ClipSpec:
    """Draw depth, frame size and box, distributed as in the challenge for both classes.

    Depth follows the histogram of its training clips. Box sides are log-normal with its mean and
    range.
    """
    rng = random_stream(seed, index, SHAPE)
    depth = int(rng.choice(_DEPTHS, p=_DEPTH_SHARES))
    frame_height, frame_width = FRAME_SIZES[int(rng.random() < _NARROW_SHARE)]
    size, aspect = rng.normal(0, (_SIZE_SIGMA, _ASPECT_SIGMA))
    height = min(_side(BOX_HEIGHT, size + aspect), frame_height - 2 * _EDGE)
    width = min(_side(BOX_WIDTH, size - aspect), frame_width - 2 * _EDGE)
    top = int(rng.integers(_EDGE, frame_height - _EDGE - height, endpoint=True))
    left = int(rng.integers(_EDGE, frame_width - _EDGE - width, endpoint=True))
    box = Box(top, left, top + height, left + width)
    return ClipSpec(seed, index, depth, frame_height, frame_width, box)


def _side(stats: tuple[int, int, int], deviation: float) -> int:
    smallest, mean, largest = stats
    median = mean * np.exp(-(_SIZE_SIGMA**2 + _ASPECT_SIGMA**2) / 2)
    return int(np.clip(round(median * np.exp(deviation)), smallest, largest))


def render_clip(spec: ClipSpec, *, stalled: bool) -> Clip:
    """Draw the frames of a clip. The label decides nothing but the travel of the cells."""
    rng = random_stream(spec.seed, spec.index, PICTURE)
    vessel = _draw_vessel(spec.box, rng)
    tissue = _draw_tissue(spec, rng)
    shadows = _draw_shadows(spec.depth, vessel.length, rng, stalled=stalled)
    brightness = rng.uniform(130, 180)
    gain = 1 + 0.06 * _drift(spec.depth, 1, memory=25, rng=rng)[:, 0]
    jitter = 0.2 * _drift(spec.depth, 2, memory=3, rng=rng)
    outline = vessel.outline + 0.4 * _drift(spec.depth, 2, memory=8, rng=rng)[:, None]
    noise = _noise_tile(spec, rng)
    noise_offsets = rng.integers(0, _TILE_MARGIN, (spec.depth, 2), endpoint=True)
    # Photon noise grows with the root of the signal; the rest comes from the detector.
    clear = tissue.copy()
    clear[vessel.rows, vessel.columns] += brightness * vessel.lumen
    noise_level = _NOISE * np.sqrt(0.6 + clear / 100)

    frames = np.empty((spec.depth, spec.frame_height, spec.frame_width, 3), np.uint8)
    for t, frame in enumerate(frames):
        image = tissue.copy()
        light = brightness * vessel.lumen * shadows[t, vessel.station]
        image[vessel.rows, vessel.columns] += light
        image = _shifted(image, jitter[t])
        top, left = noise_offsets[t]
        grain = noise[top : top + spec.frame_height, left : left + spec.frame_width]
        grey = cv2.addWeighted(image, gain[t], grain * noise_level, 1, 0, dtype=cv2.CV_8U)
        cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB, dst=frame)
        _draw_outline(frame, outline[t])
    return Clip(frames, [_box_around(points) for points in outline])


def vessel_mask(spec: ClipSpec) -> np.ndarray:
    """Which pixels of a frame are inside the target vessel, bool [H, W]. The jitter of the frames,
    a fifth of a pixel, is not in it."""
    vessel = _draw_vessel(spec.box, random_stream(spec.seed, spec.index, PICTURE))
    mask = np.zeros((spec.frame_height, spec.frame_width), bool)
    mask[vessel.rows, vessel.columns] = vessel.lumen > 0.5
    return mask


@dataclass(frozen=True, slots=True)
class _Vessel:
    """The target vessel and its outline.

    Attributes:
        rows: int64 [P], the pixels of the lumen, and so ``columns``.
        lumen: float32 [P], the share of each pixel that is inside.
        station: int64 [P], the point along the vessel that each pixel belongs to.
        outline: float32 [N, 2], (x, y) of the closed outline.
        length: in pixels.
    """

    rows: np.ndarray
    columns: np.ndarray
    lumen: np.ndarray
    station: np.ndarray
    outline: np.ndarray
    length: float


def _draw_vessel(box: Box, rng: np.random.Generator) -> _Vessel:
    """A bent tube between opposite corners of the box, with an outline that fills the box."""
    height, width = box.bottom - box.top, box.right - box.left
    radius = float(np.clip(0.14 * min(height, width), 2.4, 22))
    distance = radius + max(3.2, 0.5 * radius)
    inset = distance + OUTLINE_WIDTH / 2
    along = np.linspace(0, 1, _STATIONS)
    bend = np.exp(rng.uniform(-0.6, 0.6))
    rising = rng.random() < 0.5
    x = inset + along * (width - 1 - 2 * inset)
    y = inset + along**bend * (height - 1 - 2 * inset)
    centreline = np.stack([x, height - 1 - y if rising else y], axis=1)

    steps = np.linalg.norm(np.diff(centreline, axis=0), axis=1)
    arc = np.concatenate([[0], np.cumsum(steps)])
    rows, columns = np.nonzero(_stroke((height, width), centreline, 2 * (radius + 1)))
    offsets = np.stack([columns, rows], axis=1)[:, None] - centreline
    squared = (offsets**2).sum(axis=-1)
    nearest = squared.argmin(axis=1)
    lumen = np.exp(-((squared.min(axis=1) / radius**2) ** 2))
    outline = _contour(_stroke((height, width), centreline, 2 * distance))
    return _Vessel(
        rows + box.top,
        columns + box.left,
        lumen.astype(np.float32),
        (arc[nearest] / arc[-1] * (_STATIONS - 1)).round().astype(np.int64),
        outline + np.array([box.left, box.top], np.float32),
        float(arc[-1]),
    )


def _stroke(shape: tuple[int, int], line: np.ndarray, width: float) -> np.ndarray:
    canvas = np.zeros(shape, np.uint8)
    points = np.round(line * 16).astype(np.int32)
    cv2.polylines(canvas, [points], False, 1, thickness=round(width), shift=4)
    return canvas


def _contour(mask: np.ndarray) -> np.ndarray:
    """The outer border of a mask, float32 [N, 2] as (x, y), smoothed over three points."""
    (border, *_), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = border[:, 0].astype(np.float32)
    return np.asarray((np.roll(points, 1, axis=0) + points + np.roll(points, -1, axis=0)) / 3)


def _draw_tissue(spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Brightness of everything but the target vessel, float32 [H, W]: mottling, other vessels."""
    size = (spec.frame_width, spec.frame_height)
    mottling = rng.normal(22, 4, (6, 8)).astype(np.float32)
    tissue = np.asarray(cv2.resize(mottling, size, interpolation=cv2.INTER_CUBIC))
    others = np.zeros_like(tissue)
    for _ in range(rng.poisson(5)):
        start, middle, end = rng.uniform((-40, -40), np.add(size, 40), (3, 2))
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        points = curve.round().astype(np.int32)
        cv2.polylines(others, [points], False, rng.uniform(10, 45), int(rng.integers(4, 14)))
    return np.asarray(tissue + cv2.GaussianBlur(others, (0, 0), 2.5))


def _draw_shadows(
    depth: int, length: float, rng: np.random.Generator, *, stalled: bool
) -> np.ndarray:
    """Share of the vessel's light that passes the shadows, float32 [D, stations]."""
    width = max(rng.uniform(0.035, 0.055), 1.3 / length)
    darkness = np.clip(rng.lognormal(np.log(1.1), 0.15), 0.7, 1.6)
    in_view = rng.uniform(0.18, 0.27) / width
    frames_in_focus = float(np.clip(depth * rng.uniform(0.15, 0.2), 6, 12))

    # Cells come into focus one after the other, from before the first frame to after the last.
    lead = 2 * frames_in_focus
    cells = np.arange(int((depth + 2 * lead) * in_view / frames_in_focus))
    focus_time = cells * frames_in_focus / in_view - lead + rng.uniform(0, 1)
    position = rng.random() + cells * _GOLDEN_SECTION
    cell_darkness = darkness * rng.uniform(0.9, 1.1, len(cells))
    speed = rng.uniform(0.4, 0.7) * 2.35 * width * rng.choice([-1, 1])
    travel = _travel(depth, speed, rng)
    # The only use of the label.
    if stalled:
        travel = np.zeros_like(travel)

    frame = np.arange(depth)[:, None]
    focus = _gaussian((frame - focus_time) / (frames_in_focus / 2.35))
    stations = np.linspace(0, 1, _STATIONS, dtype=np.float32)
    density = np.empty((depth, _STATIONS), np.float32)
    for t in range(depth):
        seen = focus[t] > 0.01
        distance = _circular_distance(stations, position[seen, None] + travel[t])
        density[t] = (cell_darkness[seen] * focus[t, seen]) @ _gaussian(distance / width)

    adherent = rng.poisson(rng.uniform(0.13, 0.36) / width)
    site = rng.random((adherent, 1))
    site_width = width * rng.uniform(0.6, 1.6, (adherent, 1))
    site_darkness = darkness * rng.lognormal(-0.3, 0.5, adherent)
    density += site_darkness @ _gaussian(_circular_distance(stations, site) / site_width)
    return np.exp(-density)


def _travel(depth: int, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Displacement of pulsating flow, float64 [D], in vessel lengths."""
    period, phase, pulse = rng.uniform(8, 20), rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4)
    velocity = speed * (1 + pulse * np.sin(2 * np.pi * np.arange(depth) / period + phase))
    return np.cumsum(velocity)


def _gaussian(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x**2, dtype=np.float32, casting="same_kind")


def _circular_distance(stations: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Signed distance on a circle of circumference 1."""
    return np.asarray((stations - position + 0.5) % 1 - 0.5)


def _drift(depth: int, columns: int, *, memory: float, rng: np.random.Generator) -> np.ndarray:
    """Stationary first-order autoregression of unit variance, float64 [D, columns]."""
    keep = np.exp(-1 / memory)
    steps = rng.standard_normal((depth, columns))
    steps[1:] *= np.sqrt(1 - keep**2)
    for t in range(1, depth):
        steps[t] += keep * steps[t - 1]
    return steps


def _noise_tile(spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Grain of unit variance, larger than a frame: each frame takes a window of it."""
    shape = (spec.frame_height + _TILE_MARGIN, spec.frame_width + _TILE_MARGIN)
    grain = cv2.GaussianBlur(rng.standard_normal(shape, dtype=np.float32), (0, 0), 0.7)
    return np.asarray(grain / grain.std())


def _shifted(image: np.ndarray, offset: np.ndarray) -> np.ndarray:
    shift = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32)
    size = (image.shape[1], image.shape[0])
    return np.asarray(cv2.warpAffine(image, shift, size, borderMode=cv2.BORDER_REPLICATE))


def _draw_outline(frame: np.ndarray, points: np.ndarray) -> None:
    fixed_point = np.round(points * 16).astype(np.int32)
    cv2.polylines(frame, [fixed_point], True, OUTLINE_COLOUR, OUTLINE_WIDTH, cv2.LINE_AA, shift=4)


def _box_around(points: np.ndarray) -> Box:
    left, top = np.floor(points.min(axis=0) - OUTLINE_WIDTH / 2 + 0.5).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + OUTLINE_WIDTH / 2 + 0.5).astype(int)
    return Box(int(top), int(left), int(bottom), int(right))
