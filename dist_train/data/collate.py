"""Samples -> one batch, zero-padded in depth or packed, with the true depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.data.dataset import Sample
from dist_train.data.native import NativeClips, pack


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


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal height and width; shorter clips get black frames at their end. Samples
    with a draw are packed as they are."""
    depths = [len(sample.volume) for sample in samples]
    draws = [sample.draw for sample in samples if sample.draw is not None]
    volumes = [sample.volume for sample in samples]
    return Batch(
        volumes=pack(volumes, draws) if draws else _stack(volumes),
        frames=torch.tensor(depths) if min(depths) < max(depths) else None,
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.float32),
        clips=torch.tensor([sample.clip for sample in samples]),
    )


def _stack(volumes: Sequence[Tensor]) -> Tensor:
    _, height, width = volumes[0].shape
    depth = max(map(len, volumes))
    stacked = torch.zeros(len(volumes), 1, depth, height, width, dtype=torch.uint8)
    for row, volume in zip(stacked, volumes, strict=True):
        row[0, : len(volume)] = volume
    return stacked
