"""Stored clip -> the array that the model sees."""

from __future__ import annotations

import numpy as np

from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.draw import Draw
from dist_train.data.augment.original import OriginalAugment
from dist_train.data.augment.resize import resize
from dist_train.data.loading.sampler import Slot
from dist_train.data.plan.shuffle import Ints
from dist_train.data.store.reader import Store
from dist_train.data.types import Volume

MOST_FRAMES = 2**31 - 1


class ClipDataset:
    """Clips of a store, cut to ``max_frames``, resized to ``size`` and augmented.

    With ``augment`` the place of the cut is random, keyed like the augmentation; without, it is the
    middle of the clip. With ``on_device`` clips are only cut: the device does the rest.

    It is pickled without the store's columns, which each process maps.
    """

    def __init__(
        self,
        store: Store,
        *,
        size: tuple[int, int],
        max_frames: int | None,
        augment: Augment | OriginalAugment | None,
        on_device: bool = False,
    ) -> None:
        self.store, self.size, self.augment, self.on_device = store, size, augment, on_device
        self._max_frames = max_frames or MOST_FRAMES

    def labels(self, clips: list[int]) -> Ints:
        """int64 [n]."""
        return self.store.table["label"][clips].astype(np.int64)

    def depths(self, clips: list[int]) -> Ints:
        """Frames of the clips after the cut: int64 [n]."""
        frames = self.store.table["frames"][clips].astype(np.int64)
        return np.minimum(frames, self._max_frames)

    def depth(self, clip: int) -> int:
        """Frames of a clip after the cut."""
        return min(int(self.store.table["frames"][clip]), self._max_frames)

    def fill(self, out: Volume, slot: Slot) -> None:
        """Write a clip as the model sees it to ``out``, uint8 [D, *size], C-contiguous."""
        clip = self._cut(slot)
        if self.augment is None:
            resize(clip, self.size, out)
        else:
            out[:] = self.augment(resize(clip, self.size), epoch=slot.epoch, number=slot.clip)

    def native_shape(self, clip: int) -> tuple[int, int, int]:
        """(D, H, W) of a clip that is cut and not resized."""
        height, width = (int(self.store.table[name][clip]) for name in ("height", "width"))
        return self.depth(clip), height, width

    def fill_native(self, out: Volume, slot: Slot) -> Draw:
        """Write a clip, only cut, to ``out``, uint8 of ``native_shape``, C-contiguous.

        Returns:
            The augmentation that the device applies after it has resized the clip.
        """
        if self.depth(slot.clip) == self.store.table["frames"][slot.clip]:
            self.store.read_into(out, slot.clip)
        else:
            out[:] = self._cut(slot)
        if self.augment is None:
            return Draw()
        assert isinstance(self.augment, Augment), "presets run on the host"
        return self.augment.draw(self.size, epoch=slot.epoch, number=slot.clip)

    def _cut(self, slot: Slot) -> Volume:
        clip, depth = self.store.read(slot.clip), self.depth(slot.clip)
        start = spare = len(clip) - depth
        if self.augment is None:
            start = spare // 2
        elif spare:
            key = (self.augment.seed, slot.epoch, slot.clip, 1)
            start = int(np.random.default_rng(key).integers(spare + 1))
        return clip[start : start + depth]
