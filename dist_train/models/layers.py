"""Convolution in 3D that is right where the CPU library's is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.padding import ValidFrames


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``, with more depth padding on the CPU for clips shallower than the kernel.

    For those, oneDNN's gradient of the weights holds memory that was never written: values up to
    1e36, other ones in each run, in every memory layout. Seen in oneDNN 3.12 (torch 2.13,
    AVX512-BF16): in bfloat16 with fewer frames than the kernel is deep, which befalls layer 4 of a
    ResNet for clips of up to 32 frames; in float32 with a 7x7x7 kernel of stride 2 and at most 7
    frames. More frames of zeros behind the clip are what the convolution pads it with anyway, so
    the outputs that are kept, and all gradients, are the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W']."""
        depth, stride = input.shape[2], self.stride[0]
        enough = self._right_from(input)
        if depth >= enough:
            return super().forward(input)
        deeper = super().forward(F.pad(input, (0, 0, 0, 0, 0, enough - depth)))
        return deeper[:, :, : (depth - 1) // stride + 1]

    def _right_from(self, input: Tensor) -> int:
        """The depth from which the library's gradient is right."""
        kernel = self.kernel_size[0]
        if input.device.type != "cpu" or kernel == 1:
            return 1
        if kernel > 3 and self.stride[0] > 1:
            return kernel + 1
        in_bfloat16 = input.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")
        return kernel if in_bfloat16 else 1


# Pooling that is blind to padding.


def global_average_pool(x: Tensor, valid: ValidFrames | None = None) -> Tensor:
    """Average [B, C, D, H, W] over the voxels of its real frames.

    Returns:
        [B, C], in float32 also where ``x`` is of lower precision.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if valid is None:
        return x.mean(dim=(2, 3, 4), dtype=dtype)
    real = valid.on_device[:, None]
    of_frames = x.mean(dim=(3, 4), dtype=dtype).masked_fill(~real, 0.0)
    return of_frames.sum(dim=2) / real.sum(dim=2)


# A strided convolution of few channels as one of stride 1 over blocks of voxels.


#: Of one axis: voxels of a block, zeros before the kernel, kernel in blocks, output's length, and
#: zeros before and after the input.
_Axis = tuple[int, int, int, int, int, int]


class FoldedConv3d(Conv3d):
    """``Conv3d`` of a float input by space to depth. Its parameters have ``Conv3d``'s shapes.

    Results differ from those of ``Conv3d`` by rounding alone: sums run in another order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = self.groups == 1 and set(self.dilation) == {1} and self.padding_mode == "zeros"
        assert plain, "no other convolution is asked for"

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W']."""
        axes = [self._axis(axis, length) for axis, length in enumerate(input.shape[2:])]
        # A tensor of one channel is contiguous in both formats; only this stride tells them apart.
        channels_last = 1 in (input.stride(1), self.weight.stride(1))
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        # All padding is in the input, so it is never shallower than the kernel: see layers.py.
        x = _folded(F.pad(input, _pads([(before, after) for *_, before, after in axes])), axes)
        kernel = F.pad(self.weight, _pads([(zeros, 0) for _, zeros, *_ in axes]))
        weight = _folded(kernel, axes)
        return F.conv3d(x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout))

    def _axis(self, axis: int, length: int) -> _Axis:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        padding = self.padding[axis]
        assert isinstance(padding, int)
        zeros = -kernel % stride
        blocks = (kernel + zeros) // stride
        out = (length + 2 * padding - kernel) // stride + 1
        before = padding + zeros
        return stride, zeros, blocks, out, before, stride * (out - 1 + blocks) - length - before


def _folded(x: Tensor, axes: list[_Axis]) -> Tensor:
    """[N, C, D, H, W] to [N, C * s_d * s_h * s_w, D / s_d, H / s_h, W / s_w]."""
    split = [
        n
        for length, axis in zip(x.shape[2:], axes, strict=True)
        for n in (length // axis[0], axis[0])
    ]
    x = x.reshape(*x.shape[:2], *split).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.flatten(1, 4)


def _pads(of_axes: list[tuple[int, int]]) -> list[int]:
    """In the order of ``F.pad``: the last axis first."""
    return [n for pair in reversed(of_axes) for n in pair]
