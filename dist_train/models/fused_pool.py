"""Max pooling by windows of 3x3x3 and strides of 2, one kernel each way, on CUDA.

torch's own keeps eight bytes for each output, and adds gradients up in any order, by atomics. Here
it is one byte, and each voxel's gradient is the sum over its windows in their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Of a tile of rows by channels.
ROWS, CHANNELS = 32, 64


def fused_max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest values of [B, C, D, H, W], padded by 1, and which voxels they were.

    Returns:
        [B, C, (D + 1) // 2, (H + 1) // 2, (W + 1) // 2], channels last, in the dtype of ``x``; and
        uint8 of that shape: the numbers of the voxels in their windows, line by line.
    """
    largest, taps = _FusedMaxPool.apply(x)  # type: ignore[no-untyped-call]
    return largest, taps


class _FusedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        from dist_train.models.pool_kernels import pool_kernel

        x = x.contiguous(memory_format=torch.channels_last_3d)
        batch, channels, *size = x.shape
        shape = batch, channels, *((length + 1) // 2 for length in size)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        taps = torch.empty_like(y, dtype=torch.uint8)
        pool_kernel[_grid(y)](
            x, y, taps, y.numel() // channels, *size, *shape[2:], channels, ROWS, CHANNELS
        )
        ctx.save_for_backward(taps)
        ctx.like = x.shape
        ctx.mark_non_differentiable(taps)
        return y, taps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        from dist_train.models.pool_kernels import pool_gradient_kernel

        (taps,) = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last_3d)
        _, channels, *size = ctx.like
        of_x = torch.empty(
            ctx.like, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last_3d
        )
        pool_gradient_kernel[(*_grid(taps), 8)](
            grad, taps, of_x, taps.numel() // channels, *size, *taps.shape[2:], channels,
            ROWS, CHANNELS,
        )  # fmt: skip
        return of_x


def _grid(of_rows: Tensor) -> tuple[int]:
    channels = of_rows.shape[1]
    rows = of_rows.numel() // channels
    return (-(-rows // ROWS) * -(-channels // CHANNELS),)
