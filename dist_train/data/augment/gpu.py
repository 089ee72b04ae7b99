"""Resizing and augmentation by torch, on any device, from the draws of ``params.py``.

What ``cpu.py`` does to a resized clip, in float32 and without rounding between its steps. All
that moves pixels is one step. Without an affine map or a displacement that is a matrix for the rows
and one for the columns; with one, a single bilinear resampling of the native clip. So there is less
blur than on the host, which resamples once for each.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.augment.params import Draw, Kernel
from dist_train.data.augment.resize import resize_weights


@torch.no_grad()
def augmented_batch(clips: NativeClips, size: tuple[int, int]) -> Tensor:
    """Clips at ``size`` (height, width), augmented: float32 [B, 1, D, height, width] of 0 to 1, on
    the device of their pixels. Shorter clips get black frames at their end.

    What a clip becomes does not depend on the others.
    """
    device = clips.pixels.device
    depth = max(shape[0] for shape in clips.shapes)
    volumes = torch.zeros(len(clips.shapes), 1, depth, *size, device=device)
    pixels = torch.split_with_sizes(clips.pixels, [d * h * w for d, h, w in clips.shapes])
    pictures = torch.split_with_sizes(
        clips.pictures, [2 * draw.is_displaced + draw.is_noisy for draw in clips.draws]
    )
    # Under autocast matrices would be multiplied in bfloat16.
    with torch.autocast(device.type, enabled=False):
        for volume, flat, shape, draw, own in zip(
            volumes, pixels, clips.shapes, clips.draws, pictures, strict=True
        ):
            frames = flat.view(shape)
            # All frames are treated alike, so this can come first, where they are small.
            frames = frames.flip(0) if draw.is_reversed else frames
            volume = volume[0, : shape[0]]
            volume.copy_(_moved(frames.float(), draw, own, size))
            _tone(volume, draw, own)
    return volumes.div_(255)


def _moved(frames: Tensor, draw: Draw, pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [D, h, w] resized, laid, moved and displaced: float32 [D, *size]."""
    if draw.affine is None and not draw.is_displaced:
        return _resized_and_laid(frames, draw, size)
    # Bilinear sampling would leave out pixels of a clip that shrinks.
    smaller = min(frames.shape[1], size[0]), min(frames.shape[2], size[1])
    if smaller != frames.shape[1:]:
        frames = _resized_and_laid(frames, Draw(), smaller)
    grid, share = _places(draw, pictures, size)
    sampled = F.grid_sample(frames[None], grid[None], padding_mode="border", align_corners=False)
    return sampled[0] * share


def _resized_and_laid(frames: Tensor, draw: Draw, size: tuple[int, int]) -> Tensor:
    how, (_, height, width) = draw.orientation, frames.shape
    rows = resize_weights(height, size[0], frames.device)
    columns = resize_weights(width, size[1], frames.device)
    if how.transposed:
        frames, rows, columns = frames.transpose(1, 2), columns, rows
    rows = rows.flip(0) if how.rows_reversed else rows
    columns = columns.flip(0) if how.columns_reversed else columns
    return rows @ (frames @ columns.T)


def _places(draw: Draw, pictures: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result is taken from, float32 [H, W, 2] as ``grid_sample`` counts,
    and how much of it is not black from outside, float32 [H, W].

    From the result backwards: displacement, affine map, orientation, resize.
    """
    height, width = size
    share: Tensor | float = 1.0
    if draw.is_displaced:
        x, y = pictures[0], pictures[1]
        share = _inside(x, width) * _inside(y, height)
    else:
        x = torch.arange(width, dtype=torch.float32, device=pictures.device)
        y = torch.arange(height, dtype=torch.float32, device=pictures.device)[:, None]
    forward = draw.orientation.matrix(height, width)
    if draw.affine is not None:
        forward = np.vstack([draw.affine, (0, 0, 1)]) @ forward
    back = np.linalg.inv(forward).tolist()
    x, y = (a * x + b * y + c for a, b, c in back[:2])
    if draw.affine is not None:
        share = share * _inside(x, width) * _inside(y, height)
    grid = torch.stack([_as_share(x, width), _as_share(y, height)], dim=-1)
    assert isinstance(share, Tensor)
    return grid, share


def _inside(place: Tensor, length: int) -> Tensor:
    """The weight that bilinear sampling gives to pixels 0 to length - 1, of 1."""
    return (place + 1).clamp(0, 1) * (length - place).clamp(0, 1)


def _as_share(place: Tensor, length: int) -> Tensor:
    """Places along an axis of so many pixels, from -1 at the outer edge of the first to 1 at that
    of the last: the same place on the axis that it is resized from."""
    # Beyond the middle of the outermost pixels there is nothing but black, which is taken care of.
    return (2 * place.clamp(0, length - 1) + 1) / length - 1


def _tone(frames: Tensor, draw: Draw, pictures: Tensor) -> None:
    """Brightness, contrast, gamma, blur and noise of float32 [D, H, W], in place."""
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
        frames.add_(pictures[-1]).clamp_(0, 255)


def blur_weights(kernel: Kernel, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The matrix that blurs an axis, mirrored at the middle of its outermost pixels: float32
    [length, length]."""
    reach = len(kernel) // 2
    there = np.arange(length)[:, None]
    here = there + np.arange(-reach, reach + 1)
    period = max(2 * (length - 1), 1)
    here = (length - 1) - np.abs((length - 1) - here % period) if length > 1 else here * 0
    weights = np.zeros((length, length), np.float32)
    np.add.at(weights, (np.broadcast_to(there, here.shape), here), kernel)
    return weights
