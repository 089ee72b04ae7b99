"""Clips of unequal voxel spacing and frame rate -> clips of one spacing and rate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.data.augment.levels import as_dtype
from dist_train.data.augment.resize import resize
from dist_train.data.store.reader import Store
from dist_train.data.types import Volume
from dist_train.errors import StoreError

#: Distance of voxels in um over depth, height and width; None leaves an axis as it is.
Spacing = tuple[float | None, float | None, float | None]
# Longest axis after resampling. A longer one is a spacing in another unit.
MOST = 1 << 14


class Resampling(NamedTuple):
    """How each clip of a store is resampled.

    Attributes:
        step: float64 [clips], frames of the clip from one new frame to the next.
        frames: int64 [clips], new frames.
        sizes: int64 [clips, 2], height and width at the new spacing; None leaves both axes.
    """

    step: np.ndarray
    frames: np.ndarray
    sizes: np.ndarray | None


def resampling_of(store: Store, spacing: Spacing | None, fps: float | None) -> Resampling | None:
    """The resampling to ``spacing`` and to ``fps`` frames a second; None if neither is given.

    A clip of n frames becomes n / step frames, rounded, at least one. Each frame becomes its size
    at the new spacing, rounded, at least one pixel.

    Raises:
        StoreError: clips do not say their spacing or interval, or would be longer than ``MOST``.
    """
    if spacing is None and fps is None:
        return None
    table = store.table
    (z, y, x), (is_z, is_y, is_x) = store.sampling[0].T, spacing or (None, None, None)
    step = np.ones(len(table))
    if is_z is not None:
        step = is_z / _known(store, z, "clip.spacing")
    if fps is not None:
        step = 1 / (fps * _known(store, store.sampling[1], "clip.fps"))
    frames = _length(store, table["frames"].to_numpy(), step)
    sizes = None
    if is_y is not None and is_x is not None:
        sides = (("height", y, is_y), ("width", x, is_x))
        sizes = np.stack(
            [
                _length(store, table[name].to_numpy(), new / _known(store, old, "clip.spacing"))
                for name, old, new in sides
            ],
            axis=1,
        )
    return Resampling(step, frames, sizes)


def _known(store: Store, values: np.ndarray, setting: str) -> np.ndarray:
    unknown = np.isnan(values)
    if unknown.any():
        first = store.table["filename"].iloc[int(unknown.argmax())]
        what = "interval between frames" if setting == "clip.fps" else "spacing"
        raise StoreError(
            f"{unknown.sum()} of {len(values)} clips do not say their {what}, the first is {first}",
            where=store.folder,
            fix=f"Leave out {setting}, or prepare the store anew from files that say it.",
        )
    return values


def _length(store: Store, length: np.ndarray, step: np.ndarray) -> np.ndarray:
    """int64: lengths after resampling, rounded half up."""
    new: np.ndarray = np.maximum(np.floor(length / step + 0.5), 1)
    if new.max() > MOST:
        clip = int(new.argmax())
        raise StoreError(
            f"{store.table['filename'].iloc[clip]} would be resampled from {length[clip]} to "
            f"{new[clip]:.0f} voxels along an axis",
            where=store.folder,
            fix="Give clip.spacing in um and clip.fps in frames a second.",
        )
    lengths: np.ndarray = new.astype(np.int64)
    return lengths


def resample_depth(clip: Volume, step: float, start: int, depth: int) -> Volume:
    """New frames ``start`` to ``start + depth`` (excluded) of a clip.

    The centre of new frame i is at (i + 1/2) step of the clip, whose frame j is centred at j + 1/2.
    It is interpolated linearly between its two neighbours, and rounded to the clip's dtype. Beyond
    the first and last centre it is that frame.
    """
    if step == 1:
        return clip[start : start + depth]
    places = ((np.arange(start, start + depth) + 0.5) * step - 0.5).clip(0, len(clip) - 1)
    before = places.astype(np.int64)
    weights = (places - before).astype(np.float32)
    new = np.empty((depth, *clip.shape[1:]), clip.dtype)
    for out, low, weight in zip(new, before.tolist(), weights, strict=True):
        out[:] = clip[low]
        if weight:
            pair = (clip[low].astype(np.float32), clip[low + 1].astype(np.float32))
            out[:] = as_dtype(pair[0] * (1 - weight) + pair[1] * weight, clip.dtype)
    return new


def fit(clip: Volume, size: tuple[int, int], frame: tuple[int, int], out: Volume) -> None:
    """Resize each frame to ``size``, and write its middle to ``out``, [D, *frame] and channels.
    What ``out`` has beyond the frame is black."""
    clip = resize(clip, size)
    out[:] = 0
    inner, outer = [slice(None)], [slice(None)]
    for own, whole in zip(size, frame, strict=True):
        kept = min(own, whole)
        inner.append(slice((own - kept) // 2, (own - kept) // 2 + kept))
        outer.append(slice((whole - kept) // 2, (whole - kept) // 2 + kept))
    out[tuple(outer)] = clip[tuple(inner)]
