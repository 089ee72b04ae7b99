"""Slots -> one batch, zero-padded in depth or packed, with the true depths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train.data.augment.packed_clips import NativeClips, packed
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot


@dataclass(frozen=True, slots=True)
class Batch:
    """``volumes`` uint8 [B, 1, D, H, W], or clips of their own sizes that the device is to resize;
    ``frames`` int64 [B] true depths, or None where no clip is padded; ``labels`` float32 [B];
    ``clips`` int64 [B] clip numbers."""

    volumes: Tensor | NativeClips
    frames: Tensor | None
    labels: Tensor
    clips: Tensor

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """The tensors that ``volumes`` is made of."""
        return self.volumes.tensors if isinstance(self.volumes, NativeClips) else (self.volumes,)

    def share_memory(self) -> Batch:
        """Move the tensors to shared memory, for another process; returns the batch itself.

        Raises:
            MemoryError: there is not enough shared memory, or no file descriptor for it.
        """
        try:
            for tensor in (*self.pixels, self.frames, self.labels, self.clips):
                if tensor is not None:
                    tensor.share_memory_()  # type: ignore[no-untyped-call]
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

    def part(self, start: int, stop: int) -> Batch:
        """The clips from ``start`` to ``stop`` (excluded), in the same memory and as deep."""
        volumes = self.volumes
        return Batch(
            volumes.part(start, stop) if isinstance(volumes, NativeClips) else volumes[start:stop],
            None if self.frames is None else self.frames[start:stop],
            self.labels[start:stop],
            self.clips[start:stop],
        )

    def to(self, device: torch.device) -> Batch:
        """Copy what is computed with to a device; ``frames`` and ``clips`` stay on the host."""
        return Batch(
            self.volumes.to(device, non_blocking=True),
            self.frames,
            self.labels.to(device, non_blocking=True),
            self.clips,
        )


def collate(clips: ClipDataset, slots: Sequence[Slot]) -> Batch:
    """A batch in memory of its own."""
    return fill(torch.empty(size_of(clips, slots), dtype=torch.uint8), clips, slots)


def size_of(clips: ClipDataset, slots: Sequence[Slot]) -> int:
    """Bytes of a batch's volumes."""
    if clips.on_device:
        return sum(math.prod(clips.native_shape(slot.clip)) for slot in slots)
    return math.prod(_padded_shape(clips, slots))


def fill(
    pixels: Tensor,
    clips: ClipDataset,
    slots: Sequence[Slot],
    before: Callable[[Slot], object] = lambda slot: None,
) -> Batch:
    """A batch in ``pixels``, uint8 [``size_of``], whatever they hold.

    Args:
        before: called with each slot when its clip is about to be read.
    """
    numbers = [slot.clip for slot in slots]
    depths, labels = clips.depths[numbers], clips.labels[numbers]
    return Batch(
        volumes=(_pack if clips.on_device else _pad)(pixels, clips, slots, before),
        frames=torch.from_numpy(depths) if depths.min() < depths.max() else None,
        labels=torch.from_numpy(labels.astype(np.float32)),
        clips=torch.tensor(numbers),
    )


def _padded_shape(clips: ClipDataset, slots: Sequence[Slot]) -> tuple[int, ...]:
    return len(slots), 1, max(int(clips.depths[slot.clip]) for slot in slots), *clips.size


def _pad(
    pixels: Tensor, clips: ClipDataset, slots: Sequence[Slot], before: Callable[[Slot], object]
) -> Tensor:
    """As the model sees them; shorter clips get black frames at their end."""
    volumes = pixels.view(_padded_shape(clips, slots))
    for row, slot in zip(volumes.numpy()[:, 0], slots, strict=True):
        before(slot)
        depth = clips.depths[slot.clip]
        clips.fill(row[:depth], slot)
        row[depth:] = 0
    return volumes


def _pack(
    pixels: Tensor, clips: ClipDataset, slots: Sequence[Slot], before: Callable[[Slot], object]
) -> NativeClips:
    """One behind the other, for the device to resize."""
    shapes = tuple(clips.native_shape(slot.clip) for slot in slots)
    draws, start, flat = [], 0, pixels.numpy()
    for slot, shape in zip(slots, shapes, strict=True):
        before(slot)
        end = start + math.prod(shape)
        draws.append(clips.fill_native(flat[start:end].reshape(shape), slot))
        start = end
    return packed(pixels, shapes, draws)
