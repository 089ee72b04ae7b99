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

        frames = store.table["frames"].to_numpy(np.int64)
        self.depths = frames if max_frames is None else np.minimum(frames, max_frames)

    def __getitem__(self, slot: Slot) -> Sample:
        pixels = np.empty((int(self.depths[slot.clip]), *self.size), dtype=np.uint8)
        self.fill(pixels, slot)
        return Sample(torch.from_numpy(pixels), int(self.labels[slot.clip]), slot.clip)

    def fill(self, out: Volume, slot: Slot) -> None:
        """Write the clip to ``out``, uint8 [depths[slot.clip], *size] in C order."""
        clip = self.store.read(slot.clip)
        if len(out) < len(clip):
            start = self._start(slot, len(clip) - len(out))
            clip = clip[start : start + len(out)]
        if self.augment is None:
            resize(clip, self.size, out)
        else:
            out[:] = self.augment(resize(clip, self.size), epoch=slot.epoch, number=slot.clip)

    def _start(self, slot: Slot, room: int) -> int:
        if self.augment is None:
            return room // 2
        key = (self.augment.seed, slot.epoch, slot.clip, 1)
        return int(np.random.default_rng(key).integers(room + 1))


def resize(clip: Volume, size: tuple[int, int], out: Volume | None = None) -> Volume:
    """Resize every frame of uint8 [D, H, W] to ``size`` (height, width): uint8 [D, *size].

    Area averaging where the frame shrinks, bilinear where it grows. The result is written to
    ``out`` if there is one; else it is new, or the clip itself where that has the size.
    """
    height, width = size
    if clip.shape[1:] == (height, width):
        if out is None:
            return clip
        out[:] = clip
        return out
    shrinks = clip.shape[1] * clip.shape[2] > height * width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if out is None:
        out = np.empty((len(clip), height, width), dtype=np.uint8)
    for source, target in zip(clip, out, strict=True):
        cv2.resize(source, (width, height), dst=target, interpolation=how)
    return out
