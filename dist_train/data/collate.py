"""Slots -> one batch, zero-padded in depth or packed, with the true depths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train.data.dataset import ClipDataset, Sample
from dist_train.data.native import NativeClips, pack
from dist_train.data.sampler import Slot


@dataclass(frozen=True, slots=True)
class Batch:
    """``volumes`` uint8 [B, 1, D, H, W], or clips of their own sizes that the device is to resize;
    ``frames`` int64 [B] true depths, or None where no clip is padded; ``labels`` float32 [B];
    ``clips`` int64 [B] clip numbers."""

    volumes: Tensor | NativeClips
    frames: Tensor | None
    labels: Tensor
    clips: Tensor

    def share_memory(self) -> Batch:
        """Move the tensors to shared memory, for another process; returns the batch itself.

        Raises:
            MemoryError: there is not enough shared memory, or no file descriptor for it.
        """
        volumes = self.volumes
        pixels = volumes.tensors if isinstance(volumes, NativeClips) else (volumes,)
        try:
            for tensor in (*pixels, self.frames, self.labels, self.clips):
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError as error:
            raise MemoryError(str(error)) from None
        return self

    def pin_memory(self) -> Batch:
        """Called by ``DataLoader(pin_memory=True)``, for copies that overlap the step."""
        return Batch(
            self.volumes.pin_memory(),
            self.frames,
            self.labels.pin_memory(),
            self.clips,
        )

    def to(self, device: torch.device) -> Batch:
        """Copy what is computed with to a device; ``frames`` and ``clips`` stay on the host."""
        return Batch(
            self.volumes.to(device, non_blocking=True),
            self.frames,
            self.labels.to(device, non_blocking=True),
            self.clips,
        )


def shape_of(clips: ClipDataset, slots: Sequence[Slot]) -> tuple[int, ...]:
    """Of the volumes of a batch."""
    return len(slots), 1, max(int(clips.depths[slot.clip]) for slot in slots), *clips.size


def fill(volumes: Tensor, clips: ClipDataset, slots: Iterable[Slot]) -> Batch:
    """A batch in ``volumes``, of ``shape_of``; shorter clips get black frames at their end."""
    pixels = volumes.numpy()[:, 0]
    numbers = []
    for row, slot in zip(pixels, slots, strict=True):
        depth = clips.depths[slot.clip]
        clips.fill(row[:depth], slot)
        row[depth:] = 0
        numbers.append(slot.clip)
    depths, labels = clips.depths[numbers], clips.labels[numbers]
    return Batch(
        volumes=volumes,
        frames=torch.from_numpy(depths) if depths.min() < depths.max() else None,
        labels=torch.from_numpy(labels.astype(np.float32)),
        clips=torch.tensor(numbers),
    )


def packed(samples: Iterable[Sample]) -> Batch:
    """A batch of clips with a draw, of their own sizes, for the device to resize."""
    volumes, draws, labels, clips = [], [], [], []
    for sample in samples:
        assert sample.draw is not None
        volumes.append(sample.volume)
        draws.append(sample.draw)
        labels.append(sample.label)
        clips.append(sample.clip)
    depths = [len(volume) for volume in volumes]
    return Batch(
        volumes=pack(volumes, draws),
        frames=torch.tensor(depths) if min(depths) < max(depths) else None,
        labels=torch.tensor(labels, dtype=torch.float32),
        clips=torch.tensor(clips),
    )


def collate(clips: ClipDataset, slots: Sequence[Slot]) -> Batch:
    """A batch in memory of its own."""
    if clips.on_device:
        return packed(clips[slot] for slot in slots)
    return fill(torch.empty(shape_of(clips, slots), dtype=torch.uint8), clips, slots)
