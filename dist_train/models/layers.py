"""3D convolution with a workaround for oneDNN, space-to-depth convolution, and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.padding import ValidFrames


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d`` with extra zeros on CPUs for clips smaller than the kernel.

    For such clips oneDNN's weight gradient contains unwritten memory, values up to 1e36. Seen in
    oneDNN 3.12 (torch 2.13, AVX512-BF16) in three cases: bfloat16 with fewer frames than the kernel
    is deep (layer 4 of a ResNet, clips of up to 32 frames); bfloat16 with a stride of 2 over a few
    rows or columns of pixels; and float32 with a 7x7x7 kernel of stride 2 and at most 7 frames.
    The convolution pads with zeros anyway, so more zeros change no kept output and no gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W']."""
        size = input.shape[2:]
        missing = [max(0, least - own) for least, own in zip(self._least(input), size, strict=True)]
        if not any(missing):
            return super().forward(input)
        depth, height, width = missing
        padded = super().forward(F.pad(input, (0, width, 0, height, 0, depth)))
        d, h, w = ((own - 1) // stride + 1 for own, stride in zip(size, self.stride, strict=True))
        return padded[:, :, :d, :h, :w]

    def _least(self, input: Tensor) -> tuple[int, int, int]:
        """The least depth, height and width for which the library's gradient is correct."""
        depth, *area = self.kernel_size
        if input.device.type != "cpu" or max(self.kernel_size) == 1 or not torch.is_grad_enabled():
            return 1, 1, 1
        in_bfloat16 = input.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")
        strided = in_bfloat16 and max(self.stride) > 1
        height, width = (length // 2 + 1 if strided else 1 for length in area)
        if depth > 3 and self.stride[0] > 1:
            return depth + 1, height, width
        return depth if in_bfloat16 else 1, height, width


def global_average_pool(x: Tensor, valid: ValidFrames | None = None) -> Tensor:
    """Average [B, C, D, H, W] over the voxels of real frames: [B, C], in float32 or higher."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Its gradient, expanded from one number a channel, is written in the order of the axes here.
    channels_last = x.requires_grad and x.is_contiguous(memory_format=torch.channels_last_3d)
    if channels_last:
        x = x.movedim(1, 4)
    depth = 1 if channels_last else 2
    if valid is None:
        return x.mean(dim=(depth, depth + 1, depth + 2), dtype=dtype)
    real = valid.on_device.unsqueeze(2 if channels_last else 1)
    frame_means = x.mean(dim=(depth + 1, depth + 2), dtype=dtype).masked_fill(~real, 0.0)
    return frame_means.sum(dim=depth) / real.sum(dim=depth)


#: Folding of one axis: (block length in voxels, zeros before the kernel, zeros before the input,
#: zeros after the input). A block is one stride long.
_Fold = tuple[int, int, int, int]


class FoldedConv3d(Conv3d):
    """``Conv3d`` by space to depth: blocks of voxels become channels, and the stride becomes 1.

    Pays for strided kernels over few channels. Parameters have ``Conv3d``'s shapes; only rounding
    differs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = self.groups == 1 and set(self.dilation) == {1} and self.padding_mode == "zeros"
        assert plain, "only ungrouped, undilated, zero-padded convolutions are supported"

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W']."""
        folds = [self._fold_of(axis, length) for axis, length in enumerate(input.shape[2:])]
        # A tensor of one channel is contiguous in both formats; only this stride differs.
        channels_last = 1 in (input.stride(1), self.weight.stride(1))
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        # The padding is part of the input, so the input is never shallower than the kernel.
        x = _fold(F.pad(input, _pads([(before, after) for *_, before, after in folds])), folds)
        weight = _fold(F.pad(self.weight, _pads([(zeros, 0) for _, zeros, *_ in folds])), folds)
        return F.conv3d(x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout))

    def _fold_of(self, axis: int, length: int) -> _Fold:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        padding = self.padding[axis]
        assert isinstance(padding, int)
        zeros = -kernel % stride
        out = (length + 2 * padding - kernel) // stride + 1
        before = padding + zeros
        return stride, zeros, before, stride * (out - 1) + kernel + zeros - length - before


def _fold(x: Tensor, folds: list[_Fold]) -> Tensor:
    """Space to depth: [N, C, D, H, W] to [N, C * s_d * s_h * s_w, D / s_d, H / s_h, W / s_w]."""
    for axis, (block, *_) in enumerate(folds):
        x = torch.unflatten(x, 2 + 2 * axis, (-1, block))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _pads(by_axis: list[tuple[int, int]]) -> list[int]:
    """(before, after) of each axis in the order of ``F.pad``: the last axis first."""
    return [n for pair in reversed(by_axis) for n in pair]
