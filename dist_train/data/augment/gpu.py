"""Resizing and augmentation by torch, on any device, from the draws of ``params.py``.

It does the same as ``cpu.py``, but in float32 without rounding in between. All changes of position
are one step: one matrix for the rows and one for the columns, or one bilinear resampling of the
native clip. So it blurs less than the CPU version.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data.augment.draw import Draw, Kernel
from dist_train.data.augment.levels import WHITE
from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.augment.resize import resize_weights


@torch.no_grad()
def augmented_batch(clips: NativeClips, size: tuple[int, int]) -> Tensor:
    """Resize and augment a batch: float32 [B, C, D, *size] from 0 to 1, on the pixels' device.

    Shorter clips end in black frames. A clip's result does not depend on the others.
    """
    device, channels = clips.pixels.device, clips.channels
    # Draws are in grey levels.
    level = WHITE[clips.pixels.dtype] / 255
    depth = max(shape[0] for shape in clips.shapes)
    volumes = torch.zeros(len(clips.shapes), channels, depth, *size, device=device)
    pixels = torch.split_with_sizes(clips.pixels, [channels * prod(s) for s in clips.shapes])
    pictures = torch.split_with_sizes(
        clips.pictures, [2 * draw.is_displaced + draw.is_noisy for draw in clips.draws]
    )
    # Under autocast matrices would be multiplied in bfloat16.
    with torch.autocast(device.type, enabled=False):
        for volume, flat, shape, draw, own_pictures in zip(
            volumes, pixels, clips.shapes, clips.draws, pictures, strict=True
        ):
            frames = flat.view(*shape, channels).permute(3, 0, 1, 2).float()
            frames = frames if level == 1 else frames / level
            # All frames get the same changes, so reverse them first, at their native size.
            frames = frames.flip(1) if draw.is_reversed else frames
            changed = _resampled(frames.flatten(0, 1), draw, own_pictures, size)
            _tone(changed, draw, own_pictures, whole_levels=flat.dtype == torch.uint8)
            volume[:, : shape[0]] = changed.view(channels, -1, *size)
    return volumes.div_(255)


def _resampled(frames: Tensor, draw: Draw, pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize float32 [D, h, w] and apply orientation, affine map and displacement: float32
    [D, *size]."""
    if draw.affine is None and not draw.is_displaced:
        return _resized(frames, draw, size)
    # Average along axes that shrink, as bilinear sampling would skip pixels.
    smaller = min(frames.shape[1], size[0]), min(frames.shape[2], size[1])
    if smaller != frames.shape[1:]:
        frames = _resized(frames, Draw(), smaller)
    grid, inside = _sampling_grid(draw, pictures, size)
    sampled = F.grid_sample(frames[None], grid[None], padding_mode="border", align_corners=False)
    return sampled[0] * inside


def _resized(frames: Tensor, draw: Draw, size: tuple[int, int]) -> Tensor:
    """Resize float32 [D, h, w] and apply the orientation: float32 [D, *size]."""
    orientation, (_, height, width) = draw.orientation, frames.shape
    rows = resize_weights(height, size[0], frames.device)
    columns = resize_weights(width, size[1], frames.device)
    if orientation.transposed:
        frames, rows, columns = frames.transpose(1, 2), columns, rows
    rows = rows.flip(0) if orientation.rows_reversed else rows
    columns = columns.flip(0) if orientation.columns_reversed else columns
    return rows @ (frames @ columns.T)


def _sampling_grid(draw: Draw, pictures: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The source position of each output pixel, float32 [H, W, 2] in ``grid_sample``'s coordinates,
    and its weight against the black outside, float32 [H, W].

    Traced back from the output: displacement, affine map, orientation, resize.
    """
    height, width = size
    inside: Tensor | float = 1.0
    if draw.is_displaced:
        x, y = pictures[0], pictures[1]
        inside = _inside(x, width) * _inside(y, height)
    else:
        x = torch.arange(width, dtype=torch.float32, device=pictures.device)
        y = torch.arange(height, dtype=torch.float32, device=pictures.device)[:, None]
    forward = draw.orientation.matrix(height, width)
    if draw.affine is not None:
        forward = np.vstack([draw.affine, (0, 0, 1)]) @ forward
    back = np.linalg.inv(forward).tolist()
    x, y = (a * x + b * y + c for a, b, c in back[:2])
    if draw.affine is not None:
        inside = inside * _inside(x, width) * _inside(y, height)
    grid = torch.stack([_normalised(x, width), _normalised(y, height)], dim=-1)
    assert isinstance(inside, Tensor)
    return grid, inside


def _inside(position: Tensor, length: int) -> Tensor:
    """The total weight, from 0 to 1, that bilinear sampling gives to pixels 0 to length - 1."""
    return (position + 1).clamp(0, 1) * (length - position).clamp(0, 1)


def _normalised(position: Tensor, length: int) -> Tensor:
    """Pixel positions in ``grid_sample``'s coordinates: -1 and 1 are the outer edges."""
    # Positions outside are clamped to the edge; ``_inside`` makes them black.
    return (2 * position.clamp(0, length - 1) + 1) / length - 1


def _tone(frames: Tensor, draw: Draw, pictures: Tensor, *, whole_levels: bool) -> None:
    """Apply brightness, contrast, gamma, blur and noise to float32 [D, H, W], in place.

    ``whole_levels``: truncate noise to whole grey levels.
    """
    if (draw.contrast, draw.brightness) != (1.0, 0.0):
        frames.mul_(draw.contrast).add_(draw.brightness).clamp_(0, 255)
    if draw.gamma != 1.0:
        frames.div_(255).pow_(draw.gamma).mul_(255)
    if draw.kernel is not None:
        rows, columns = (
            torch.from_numpy(blur_weights(draw.kernel, length)).to(frames.device)
            for length in frames.shape[1:]
        )
        frames.copy_(rows @ (frames @ columns.T))
    if draw.is_noisy:
        noise = pictures[-1].trunc() if whole_levels else pictures[-1]
        frames.add_(noise).clamp_(0, 255)


def blur_weights(kernel: Kernel, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The matrix that blurs an axis, mirrored at its edge pixels: float32 [length, length]."""
    reach = len(kernel) // 2
    target = np.arange(length)[:, None]
    source = target + np.arange(-reach, reach + 1)
    period = max(2 * (length - 1), 1)
    source = (length - 1) - np.abs((length - 1) - source % period) if length > 1 else source * 0
    weights = np.zeros((length, length), np.float32)
    np.add.at(weights, (np.broadcast_to(target, source.shape), source), kernel)
    return weights
