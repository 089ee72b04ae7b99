"""A strided convolution of few channels as one of stride 1 over blocks of voxels.

A convolution of stride s over one channel leaves matrix units idle: of the 8 or 16 channels that
they multiply at once they are given one. With every s neighbouring voxels of an axis folded into
channels it is a convolution of stride 1 over s_d * s_h * s_w times the channels, of a kernel that
many times smaller (as of a TPU's ResNet stem, Ying et al. 2018, "Image classification at
supercomputer scale"). The weights are the same numbers, rearranged, beside zeros where the kernel
is no multiple of the stride.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.models.conv import Conv3d

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
        # All padding is in the input, so it is never shallower than the kernel: see conv.py.
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
