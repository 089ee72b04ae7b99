"""Slot -> stored clip -> the array that the model sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.augment import Augment
from dist_train.data.augment_draw import Draw
from dist_train.data.resize import resize
from dist_train.data.sampler import Slot
from dist_train.data.store import Store


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip: ``volume`` uint8 [D, H, W], ``label`` (-1 if not known), ``clip`` its number.

    ``draw`` is what the device is to do to it once it is resized, None if all is done.
    """

    volume: Tensor
    label: int
    clip: int
    draw: Draw | None = None


class ClipDataset(Dataset[Sample]):
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
        augment: Augment | None,
        on_device: bool = False,
    ) -> None:
        self.store, self.size, self.max_frames, self.augment = store, size, max_frames, augment
        self.on_device = on_device
        self.labels = store.table["label"].to_numpy(np.int64)

    def __getitem__(self, slot: Slot) -> Sample:
        clip = self.store.read(slot.clip)
        if self.max_frames is not None and len(clip) > self.max_frames:
            start = self._start(slot, len(clip) - self.max_frames)
            clip = clip[start : start + self.max_frames]
        draw = None
        if self.on_device:
            draw = self._draw(slot)
        else:
            clip = resize(clip, self.size)
            if self.augment is not None:
                clip = self.augment(clip, epoch=slot.epoch, number=slot.clip)
        volume = torch.from_numpy(np.ascontiguousarray(clip))
        return Sample(volume, int(self.labels[slot.clip]), slot.clip, draw)

    def _draw(self, slot: Slot) -> Draw:
        if self.augment is None:
            return Draw()
        return self.augment.draw(self.size, epoch=slot.epoch, number=slot.clip)

    def _start(self, slot: Slot, room: int) -> int:
        if self.augment is None:
            return room // 2
        key = (self.augment.seed, slot.epoch, slot.clip, 1)
        return int(np.random.default_rng(key).integers(room + 1))
