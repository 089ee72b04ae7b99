"""Clips of unequal voxel spacing and frame rate -> clips of one spacing and rate."""

from __future__ import annotations

from typing import Any

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


class Resampling:
    """How the clips of a store are resampled to ``spacing`` and to ``fps`` frames a second.

    A clip of n frames becomes n / step frames, rounded, at least one. Each frame becomes its size
    at the new spacing, rounded, at least one pixel. All is found from the mapped clip table when it
    is asked for, so copies of it are small. ``clips`` are clip numbers, or a slice of them.

    Raises:
        StoreError: clips do not say their spacing or interval, or would be longer than ``MOST``.
    """

    def __init__(self, store: Store, spacing: Spacing | None, fps: float | None) -> None:
        self._table, (z, y, x) = store.table, spacing or (None, None, None)
        # Axis -> column of the clip table, and its new value; the frame rate for "interval".
        self._new: dict[str, tuple[str, float]] = {}
        if z is not None:
            self._new["frames"] = "spacing.z", z
        if fps is not None:
            self._new["frames"] = "interval", fps
        if y is not None and x is not None:
            self._new |= {"height": ("spacing.y", y), "width": ("spacing.x", x)}
        self.resizes = "height" in self._new
        for axis, (column, _) in self._new.items():
            self._check(store, axis, column)

    def step(self, clips: Any) -> Any:
        """Frames of the clip from one new frame to the next: float64."""
        return self._step("frames", clips)

    def frames(self, clips: Any) -> Any:
        """New frames: int64."""
        return self._length("frames", clips).astype(np.int64)

    def size(self, clip: int) -> tuple[int, int]:
        """Height and width of a clip at the new spacing, which must be given."""
        return int(self._length("height", clip)), int(self._length("width", clip))

    def _step(self, axis: str, clips: Any) -> Any:
        if axis not in self._new:
            return np.ones_like(self._table[axis][clips], np.float64)
        column, new = self._new[axis]
        now = self._table.sampling(column)[clips]
        return 1 / (new * now) if column == "interval" else new / now

    def _length(self, axis: str, clips: Any) -> Any:
        """Lengths after resampling, rounded half up: float64."""
        lengths = self._table[axis][clips] / self._step(axis, clips)
        return np.maximum(np.floor(lengths + 0.5), 1)

    def _check(self, store: Store, axis: str, column: str) -> None:
        unknown = np.isnan(self._table.sampling(column))
        if unknown.any():
            first = self._table.text("filename", int(unknown.argmax()))
            what, setting = "spacing", "clip.spacing"
            if column == "interval":
                what, setting = "interval between frames", "clip.fps"
            raise StoreError(
                f"{unknown.sum()} of {len(unknown)} clips do not say their {what}, the first is "
                f"{first}",
                where=store.name,
                fix=f"Leave out {setting}, or prepare the store anew from files that say it.",
            )
        new = self._length(axis, slice(None))
        if new.max() > MOST:
            clip = int(new.argmax())
            raise StoreError(
                f"{self._table.text('filename', clip)} would be resampled from "
                f"{self._table[axis][clip]} to {new[clip]:.0f} voxels along an axis",
                where=store.name,
                fix="Give clip.spacing in um and clip.fps in frames a second.",
            )


def resampling_of(store: Store, spacing: Spacing | None, fps: float | None) -> Resampling | None:
    """The resampling of a store's clips; None if neither setting is given."""
    return None if spacing is None and fps is None else Resampling(store, spacing, fps)


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
