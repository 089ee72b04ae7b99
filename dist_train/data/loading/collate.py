"""Clips -> one batch, zero-padded in depth or packed, with the true depths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_train.data.augment.packed_clips import NativeClips, packed
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B clips.

    Attributes:
        volumes: [B, C, D, H, W] of the store's dtype, or clips of their own sizes that the device
            resizes.
        frames: int64 [B], the true depths; None if no clip is padded.
        labels: float32 [B], or [B, V] for several values of a clip.
        clips: int64 [B], clip numbers.
    """

    volumes: Tensor | NativeClips
    frames: Tensor | None
    labels: Tensor
    clips: Tensor

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """The tensors of ``volumes``."""
        return self.volumes.tensors if isinstance(self.volumes, NativeClips) else (self.volumes,)

    def share_memory(self) -> Batch:
        """Move the tensors to shared memory, for another process, and return the batch itself.

        Raises:
            MemoryError: shared memory or file descriptors are exhausted.
        """
        try:
            for tensor in (*self.pixels, self.frames, self.labels, self.clips):
                if tensor is not None:
                    tensor.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise MemoryError(str(error)) from None
        return self

    def pin_memory(self) -> Batch:
        """Copy to pinned memory, for ``DataLoader``, so that copies to the device are async."""
        return replace(self, volumes=self.volumes.pin_memory(), labels=self.labels.pin_memory())

    def part(self, start: int, stop: int) -> Batch:
        """Clips ``start`` to ``stop`` (excluded), as views."""
        volumes = self.volumes
        return Batch(
            volumes.part(start, stop) if isinstance(volumes, NativeClips) else volumes[start:stop],
            None if self.frames is None else self.frames[start:stop],
            self.labels[start:stop],
            self.clips[start:stop],
        )

    def to(self, device: torch.device) -> Batch:
        """Copy volumes and labels to a device; ``frames`` and ``clips`` stay on the host."""
        return replace(
            self,
            volumes=self.volumes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


def collate(clips: ClipDataset, slots: Sequence[Slot]) -> Batch:
    """A batch in memory of its own."""
    return fill(torch.empty(size_of(clips, slots), dtype=torch.uint8), clips, slots)


def size_of(clips: ClipDataset, slots: Sequence[Slot]) -> int:
    """Bytes of a batch's volumes."""
    values = sum(map(math.prod, _shapes(clips, slots)))
    return values * clips.channels * clips.dtype.itemsize


def channels_first(volumes: Tensor) -> Tensor:
    """Interleaved channels [B, D, H, W, C] as [B, C, D, H, W], a view; contiguous for one."""
    *sizes, channels = volumes.shape
    if channels == 1:
        return volumes.view(sizes[0], 1, *sizes[1:])
    return volumes.permute(0, 4, 1, 2, 3)


def fill(
    pixels: Tensor,
    clips: ClipDataset,
    slots: Sequence[Slot],
    announce: Callable[[Slot], None] | None = None,
) -> Batch:
    """Write a batch to ``pixels``, uint8 [``size_of``], over whatever they hold.

    Args:
        announce: called with each slot before its clip is read.
    """
    clips.prefetch(slots)
    shapes, memory = _shapes(clips, slots), pixels.numpy().view(clips.dtype)
    pixels = pixels.view(torch.from_numpy(memory[:0]).dtype)
    channels = (clips.channels,) if clips.channels > 1 else ()
    draws, end = [], 0
    for slot, shape in zip(slots, shapes, strict=True):
        if announce is not None:
            announce(slot)
        start, end = end, end + math.prod(shape) * clips.channels
        out = memory[start:end].reshape(*shape, *channels)
        if clips.on_device:
            draws.append(clips.fill_native(out, slot))
        else:
            depth = clips.depth(slot.clip)
            clips.fill(out[:depth], slot)
            out[depth:] = 0
    numbers = [slot.clip for slot in slots]
    depths, labels = clips.depths(numbers), clips.labels(numbers)
    return Batch(
        packed(pixels, shapes, draws, clips.channels)
        if clips.on_device
        else channels_first(pixels.view(len(slots), *shapes[0], clips.channels)),
        frames=torch.from_numpy(depths) if depths.min() < depths.max() else None,
        labels=torch.from_numpy(labels),
        clips=torch.tensor(numbers),
    )


def _shapes(clips: ClipDataset, slots: Sequence[Slot]) -> tuple[tuple[int, int, int], ...]:
    """(D, H, W) of each clip in the batch."""
    if clips.on_device:
        return tuple(clips.native_shape(slot.clip) for slot in slots)
    deepest = max(clips.depth(slot.clip) for slot in slots)
    return ((deepest, *clips.size),) * len(slots)
