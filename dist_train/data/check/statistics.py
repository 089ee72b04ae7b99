"""Statistics of one clip's pixels, for finding faults, copies and leaks.

Grey values are on a scale of 0 to 255 whatever the dtype: uint16 is value / 257, float16 value x
255. All frames are used, as the whole clip is read for its checksum anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

#: A clip: uint8, uint16 or float16, [D, H, W] or [D, H, W, C].
Clip = np.ndarray[Any, np.dtype[Any]]
#: The mean over channels: [D, H, W], uint8 or float32 in 0..255.
Grey = np.ndarray[Any, np.dtype[Any]]

#: A clip is summarised by the mean pictures of so many parts of equal depth.
PARTS = 3
_HASH_SIDE = 8
# Fewer frames, or rows, say too little of what is usual in a clip.
_LEAST_FRAMES, _LEAST_ROWS = 5, 8
# A step between rows counts if it exceeds the usual ones by so many of their deviations.
_STEP = 8.0


@dataclass(frozen=True)
class ClipStatistics:
    """Statistics of a clip, in grey levels of 255.

    Attributes:
        means, spreads: mean and standard deviation of the grey values of each channel.
        brightest: greatest grey value.
        levels: number of different grey values, of the channel that has most.
        saturated: share of the greatest value of the dtype, of the channel that has most of it.
        repeated: share of frames that equal the frame before them, and are not of one colour.
        tear: see ``tear_of``.
        hash: see ``perceptual_hash``; None for a clip without structure.
    """

    means: tuple[float, ...]
    spreads: tuple[float, ...]
    brightest: float
    levels: int
    saturated: float
    repeated: float
    tear: float
    hash: bytes | None


def statistics_of(clip: Clip) -> ClipStatistics:
    """Take all statistics of a clip."""
    values, counts = _histograms(clip)
    total = counts.sum(axis=1)
    means = counts @ values / total
    variances = counts @ values**2 / total - means**2
    grey = grey_of(clip)
    return ClipStatistics(
        means=tuple(means.tolist()),
        spreads=tuple(np.sqrt(variances.clip(min=0)).tolist()),
        brightest=float(values[counts.any(axis=0)].max()),
        levels=int(np.count_nonzero(counts, axis=1).max()),
        saturated=float((counts @ (values >= 255) / total).max()),
        repeated=_repeated(clip),
        tear=tear_of(grey),
        hash=perceptual_hash(grey),
    )


def scaled(values: Clip) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Stored values on the scale of 0 to 255."""
    scale = {"u1": 1.0, "u2": 1 / 257, "f2": 255.0}[values.dtype.str[1:]]
    return values.astype(np.float32) * np.float32(scale)


def grey_of(clip: Clip) -> Grey:
    """The mean over channels. uint8 of one channel is returned as it is."""
    if clip.ndim == 3:
        return clip if clip.dtype == np.uint8 else scaled(clip)
    return np.asarray(scaled(clip).mean(axis=3))


def _histograms(clip: Clip) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All values of the dtype, float64 [K] on the scale of 0 to 255, and their number in each
    channel, float64 [C, K]."""
    channels = 1 if clip.ndim == 3 else clip.shape[3]
    codes = np.arange(1 << 8 * clip.itemsize, dtype=f"u{clip.itemsize}")
    finite = np.nan_to_num(codes.view(clip.dtype), posinf=0, neginf=0)
    values = scaled(finite).astype(np.float64)
    # OpenCV counts ten times as fast as bincount.
    plane = clip.view(codes.dtype).reshape(len(clip), -1, channels)
    bounds = [0, len(codes)]
    counts = [cv2.calcHist([plane], [c], None, [len(codes)], bounds) for c in range(channels)]
    return values, np.stack(counts).reshape(channels, -1).astype(np.float64)


def _repeated(clip: Clip) -> float:
    """Share of frames that equal the one before; those of one colour, as the black slices of a
    volume, do not count."""
    middle = clip.shape[1] // 2
    # Most frames differ in their first row already.
    equal = [
        np.array_equal(a[middle], b[middle])
        and np.array_equal(a, b)
        and np.ptp(a, axis=(0, 1)).any()
        for b, a in pairwise(clip)
    ]
    return float(np.sum(equal) / max(len(equal), 1))


def tear_of(grey: Grey) -> float:
    """How torn the most suspicious frame is: a part of it below some row is of another picture.

    A frame that was decoded from damaged data is sound above a row, and grey or displaced below.
    The row where the step to the next row most exceeds the usual step is looked at if it does so
    by ``_STEP`` deviations. Below it, a torn frame differs from both of its neighbours far more
    than they differ from each other; above it, it does not.

    Returns:
        The ratio of these differences below the row to that above. On 986 sound clips (synthetic
        capillaries, lung ultrasound, MedMNIST vessels) it was 1.8 at most; on 600 clips with one
        frame torn it was above 2.5 in 94 %. 0 where no row is suspicious.
    """
    depth, height, width = grey.shape
    if depth < _LEAST_FRAMES or height < _LEAST_ROWS:
        return 0.0
    rows = cv2.absdiff(grey[:, 1:].reshape(-1, width), grey[:, :-1].reshape(-1, width))
    steps = cv2.reduce(rows, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F).reshape(depth, height - 1)
    excess = steps - np.median(steps, axis=0)
    t, row = np.unravel_index(int(excess.argmax()), excess.shape)
    # 1.4826 turns the median deviation of a normal variable into its standard deviation.
    if excess[t, row] < _STEP * (1.4826 * np.median(np.abs(excess)) + 0.25):
        return 0.0
    one, other = (t - 1, t + 1) if 0 < t < depth - 1 else (abs(t - 1), abs(t - 2))

    def oddness(part: slice) -> float:
        frame, a, b = grey[t, part], grey[one, part], grey[other, part]
        own = min(_difference(frame, a), _difference(frame, b))
        return own / _difference(a, b)

    return oddness(slice(int(row) + 1, None)) / max(oddness(slice(int(row) + 1)), 1.0)


def _difference(a: Grey, b: Grey) -> float:
    """Mean absolute difference; 1 is added, so that ratios of nearly equal frames are near 1."""
    return float(cv2.absdiff(a, b).mean()) + 1.0


def mean_pictures(grey: Grey, height: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Mean pictures of ``PARTS`` parts of a clip, float32 [PARTS, height, width]."""
    edges = np.linspace(0, len(grey), PARTS + 1)
    parts = []
    for first, last in pairwise(edges):
        begin = min(int(first), len(grey) - 1)
        frames = grey[begin : max(int(last), begin + 1)]
        flat = frames.reshape(len(frames), -1)
        mean = cv2.reduce(flat, 0, cv2.REDUCE_AVG, dtype=cv2.CV_32F).reshape(grey.shape[1:])
        parts.append(cv2.resize(mean, (width, height), interpolation=cv2.INTER_AREA))
    return np.stack(parts)


def perceptual_hash(grey: Grey) -> bytes | None:
    """Hash of a clip that changes in few bits where its pixels change little.

    The difference hash of pictures (whether each pixel of an 8 x 9 thumbnail is brighter than its
    neighbour), of the mean picture of each part: 64 bits a part.

    Returns:
        8 x PARTS bytes; None if the thumbnails show no structure.
    """
    thumbnails = mean_pictures(grey, _HASH_SIDE, _HASH_SIDE + 1)
    if thumbnails.std() < 1:
        return None
    return np.packbits(thumbnails[:, :, 1:] > thumbnails[:, :, :-1]).tobytes()
