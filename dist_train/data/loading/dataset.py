"""Slot -> stored clip -> the array that the model sees."""

from __future__ import annotations

import numpy as np

from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.original import OriginalAugment
from dist_train.data.augment.params import Draw
from dist_train.data.augment.resize import resize
from dist_train.data.loading.sampler import Slot
from dist_train.data.store.reader import Store
from dist_train.data.types import Volume


class ClipDataset:
    """Clips of a store, cut to ``max_frames``, resized to ``size`` and augmented.

    With ``augment`` None the cut is the middle of the clip; otherwise its place is random, keyed
    like the augmentation. With ``on_device`` clips are only cut, and a draw goes along.
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
        self.store, self.size, self.max_frames, self.augment = store, size, max_frames, augment
        self.on_device = on_device
        self.labels = store.table["label"].to_numpy(np.int64)
        frames = store.table["frames"].to_numpy(np.int64)
        self.depths = frames if max_frames is None else np.minimum(frames, max_frames)
        self._frames, self._sides = frames, store.table[["height", "width"]].to_numpy(np.int64)

    def fill(self, out: Volume, slot: Slot) -> None:
        """Write the clip as the model sees it to ``out``, uint8 [depths[slot.clip], *size] in C
        order; not for a dataset that leaves that to the device."""
        clip = self._cut(slot)
        if self.augment is None:
            resize(clip, self.size, out)
        else:
            out[:] = self.augment(resize(clip, self.size), epoch=slot.epoch, number=slot.clip)

    def native_shape(self, clip: int) -> tuple[int, int, int]:
        """D, H and W of a clip as it is stored, only cut."""
        height, width = self._sides[clip].tolist()
        return int(self.depths[clip]), height, width

    def fill_native(self, out: Volume, slot: Slot) -> Draw:
        """Write the clip, only cut, to ``out``, uint8 of ``native_shape`` in C order.

        Returns:
            What is to be done to it once it is resized.
        """
        if self.depths[slot.clip] == self._frames[slot.clip]:
            self.store.read_into(out, slot.clip)
        else:
            out[:] = self._cut(slot)
        if self.augment is None:
            return Draw()
        assert isinstance(self.augment, Augment), "a preset is of the host"
        return self.augment.draw(self.size, epoch=slot.epoch, number=slot.clip)

    def _cut(self, slot: Slot) -> Volume:
        """The clip as it is stored, cut to ``max_frames``."""
        clip, depth = self.store.read(slot.clip), int(self.depths[slot.clip])
        start = self._start(slot, len(clip) - depth) if depth < len(clip) else 0
        return clip[start : start + depth]

    def _start(self, slot: Slot, room: int) -> int:
        if self.augment is None:
            return room // 2
        key = (self.augment.seed, slot.epoch, slot.clip, 1)
        return int(np.random.default_rng(key).integers(room + 1))
