"""Slot -> stored clip -> the array that the model sees."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.augment import Augment
from dist_train.data.decode import Volume
from dist_train.data.sampler import Slot
from dist_train.data.store import Store


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip: ``volume`` uint8 [D, H, W], ``label`` (-1 if not known), ``clip`` its number."""

    volume: Tensor
    label: int
    clip: int


class ClipDataset(Dataset[Sample]):
    """Clips of a store, cut to ``max_frames``, resized to ``size`` and augmented.

    With ``augment`` None the cut is the middle of the clip; otherwise its place is random, keyed
    like the augmentation.
    """

    def __init__(
        self,
        store: Store,
        *,
        size: tuple[int, int],
        max_frames: int | None,
        augment: Augment | None,
    ) -> None:
        self.store, self.size, self.max_frames, self.augment = store, size, max_frames, augment
        self.labels = store.table["label"].to_numpy(np.int64)

    def __getitem__(self, slot: Slot) -> Sample:
        clip = self.store.read(slot.clip)
        if self.max_frames is not None and len(clip) > self.max_frames:
            start = self._start(slot, len(clip) - self.max_frames)
            clip = clip[start : start + self.max_frames]
        clip = resize(clip, self.size)
        if self.augment is not None:
            clip = self.augment(clip, epoch=slot.epoch, number=slot.clip)
        volume = torch.from_numpy(np.ascontiguousarray(clip))
        return Sample(volume, int(self.labels[slot.clip]), slot.clip)

    def _start(self, slot: Slot, room: int) -> int:
        if self.augment is None:
            return room // 2
        key = (self.augment.seed, slot.epoch, slot.clip, 1)
        return int(np.random.default_rng(key).integers(room + 1))


def resize(clip: Volume, size: tuple[int, int]) -> Volume:
    """Resize every frame of uint8 [D, H, W] to ``size`` (height, width): uint8 [D, *size].

    Area averaging where the frame shrinks, bilinear where it grows.
    """
    height, width = size
    if clip.shape[1:] == (height, width):
        return clip
    shrinks = clip.shape[1] * clip.shape[2] > height * width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = np.empty((len(clip), height, width), dtype=np.uint8)
    for source, target in zip(clip, out, strict=True):
        cv2.resize(source, (width, height), dst=target, interpolation=how)
    return out
