"""Stored clip -> the array that the model sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.draw import Draw
from dist_train.data.augment.original import OriginalAugment
from dist_train.data.augment.resize import resize
from dist_train.data.loading.resample import Resampling, fit, resample_depth
from dist_train.data.loading.sampler import Slot
from dist_train.data.plan.shuffle import Ints
from dist_train.data.store.reader import Store
from dist_train.data.types import Volume

MOST_FRAMES = 2**31 - 1


class ClipDataset:
    """Clips of a store, resampled, cut to ``max_frames``, resized to ``size`` and augmented.

    If the resampling gives frames a size of their own, they are cropped or padded to ``size``.
    With ``augment`` the place of the cut is random, keyed like the augmentation; without, it is the
    middle of the clip. With ``on_device`` clips are only resampled and cut: the device does the
    rest.

    The labels are the store's, or else ``labels``, [clips] or [clips, V].

    It is pickled without the store's columns, which each process maps.

    Attributes:
        channels: number of channels.
        dtype: of the pixels, as in the store.
    """

    def __init__(
        self,
        store: Store,
        *,
        size: tuple[int, int],
        max_frames: int | None,
        augment: Augment | OriginalAugment | None,
        on_device: bool = False,
        resampling: Resampling | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        self.store, self.size, self.augment, self.on_device = store, size, augment, on_device
        self._max_frames = max_frames or MOST_FRAMES
        self.channels, self.dtype = len(store.channels), store.dtype
        self._resampling, self._labels = resampling, labels

    def labels(self, clips: list[int]) -> np.ndarray:
        """float32 [n], or [n, V] for several values of a clip."""
        labels = self.store.table["label"] if self._labels is None else self._labels
        return labels[clips].astype(np.float32)

    def depths(self, clips: list[int]) -> Ints:
        """Frames of the clips after resampling and the cut: int64 [n]."""
        depths: Ints = np.minimum(self._frames(clips), self._max_frames).astype(np.int64)
        return depths

    def depth(self, clip: int) -> int:
        """Frames of a clip after resampling and the cut."""
        return min(int(self._frames(clip)), self._max_frames)

    def _frames(self, clips: Any) -> Any:
        """Frames after resampling, before the cut."""
        if self._resampling is not None:
            return self._resampling.frames(clips)
        return self.store.table["frames"][clips]

    def fill(self, out: Volume, slot: Slot) -> None:
        """Write a clip as the model sees it to ``out``, [D, *size] or [D, *size, C],
        C-contiguous."""
        clip = self._cut(slot)
        if self._is_fitted:
            self._fit(clip, slot, out)
            clip = out
        if self.augment is None:
            resize(clip, self.size, out)
        else:
            out[:] = self.augment(resize(clip, self.size), epoch=slot.epoch, number=slot.clip)

    @property
    def _is_fitted(self) -> bool:
        return self._resampling is not None and self._resampling.resizes

    def _fit(self, clip: Volume, slot: Slot, out: Volume) -> None:
        assert self._resampling is not None
        fit(clip, self._resampling.size(slot.clip), self.size, out)

    def prefetch(self, slots: Iterable[Slot]) -> None:
        """Start reading the clips of a batch that is soon made, if the store is remote."""
        self.store.prefetch(slot.clip for slot in slots)

    def native_shape(self, clip: int) -> tuple[int, int, int]:
        """(D, H, W) of a clip that is resampled and cut, and not resized."""
        if self._is_fitted:
            return self.depth(clip), *self.size
        height, width = (int(self.store.table[name][clip]) for name in ("height", "width"))
        return self.depth(clip), height, width

    def fill_native(self, out: Volume, slot: Slot) -> Draw:
        """Write a clip, only resampled and cut, to ``out``, of ``native_shape`` and channels,
        C-contiguous.

        Returns:
            The augmentation that the device applies after it has resized the clip.
        """
        if self._is_fitted:
            self._fit(self._cut(slot), slot, out)
        elif self._resampling is None and self.depth(slot.clip) == self._frames(slot.clip):
            self.store.read_into(out, slot.clip)
        else:
            out[:] = self._cut(slot)
        if self.augment is None:
            return Draw()
        assert isinstance(self.augment, Augment), "presets run on the host"
        return self.augment.draw(self.size, epoch=slot.epoch, number=slot.clip)

    def _cut(self, slot: Slot) -> Volume:
        clip, depth = self.store.read(slot.clip), self.depth(slot.clip)
        start = spare = int(self._frames(slot.clip)) - depth
        if self.augment is None:
            start = spare // 2
        elif spare:
            key = (self.augment.seed, slot.epoch, slot.clip, 1)
            start = int(np.random.default_rng(key).integers(spare + 1))
        step = 1.0 if self._resampling is None else float(self._resampling.step(slot.clip))
        return resample_depth(clip, step, start, depth)
