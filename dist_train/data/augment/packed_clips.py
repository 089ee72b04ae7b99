"""A batch of clips at their native sizes, concatenated, with the draw of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_train.data.augment.draw import NO_PICTURES, Draw


@dataclass(frozen=True, slots=True)
class NativeClips:
    """Clips to be resized and augmented on a device: their pixels, [N], each clip's [D, H, W, C]
    flattened and concatenated; shapes (D, H, W); draws without their pictures; the pictures of all
    draws, float32 [P, height, width]; and the number of channels."""

    pixels: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    draws: tuple[Draw, ...]
    pictures: Tensor
    channels: int = 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.pixels, self.pictures

    def part(self, start: int, stop: int) -> NativeClips:
        """Clips ``start`` to ``stop`` (excluded), as views. Only for clips without pictures."""
        assert not len(self.pictures), "the split of pictures between clips is unknown"
        before, own = (
            sum(map(math.prod, shapes)) * self.channels
            for shapes in (self.shapes[:start], self.shapes[start:stop])
        )
        return replace(
            self,
            pixels=self.pixels[before : before + own],
            shapes=self.shapes[start:stop],
            draws=self.draws[start:stop],
        )

    def pin_memory(self) -> NativeClips:
        return replace(self, pixels=self.pixels.pin_memory(), pictures=self.pictures.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> NativeClips:
        """Copy to a device, as ``Tensor.to`` does."""
        pixels, pictures = (t.to(device, non_blocking=non_blocking) for t in self.tensors)
        return replace(self, pixels=pixels, pictures=pictures)


def pack(clips: Sequence[Tensor], draws: Sequence[Draw]) -> NativeClips:
    """Concatenate clips, [D, H, W] or [D, H, W, C] each, and their draws."""
    shapes = tuple((clip.shape[0], clip.shape[1], clip.shape[2]) for clip in clips)
    channels = math.prod(clips[0].shape[3:])
    return packed(torch.cat([clip.reshape(-1) for clip in clips]), shapes, draws, channels)


def packed(
    pixels: Tensor,
    shapes: tuple[tuple[int, int, int], ...],
    draws: Sequence[Draw],
    channels: int = 1,
) -> NativeClips:
    """``NativeClips`` of pixels that are concatenated already, [N], and the clips' draws."""
    pictures = [torch.from_numpy(draw.pictures) for draw in draws if len(draw.pictures)]
    return NativeClips(
        pixels,
        shapes,
        tuple(replace(draw, pictures=NO_PICTURES) for draw in draws),
        torch.cat(pictures) if pictures else torch.from_numpy(NO_PICTURES.copy()),
        channels,
    )
