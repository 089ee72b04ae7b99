"""A convolution with batch normalisation and activation: the unit that most networks consist of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dist_train.models.layers import Conv3d, FoldedConv3d
from dist_train.models.norm import BatchNorm3d
from dist_train.models.padding import ValidFrames
from dist_train.models.rematerialize import recomputable

#: One number for all of depth, height and width, or one for each.
Size = int | tuple[int, int, int]


class ConvNorm(nn.Module):
    """Convolution without bias (padding: half the kernel), batch normalisation, activation.

    Args:
        relu: a ReLU follows, which normalisation may be fused with.
        gate: maps the normalised tensor and its real frames to factors for it, [B, C, 1, 1, 1].
        act: another function of single values, which comes last.
        groups: of the convolution's channels.
        folded: compute by space to depth (layers.py).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: Size,
        stride: Size = 1,
        *,
        relu: bool = False,
        gate: nn.Module | None = None,
        act: Callable[[Tensor], Tensor] | None = None,
        groups: int = 1,
        folded: bool = False,
    ) -> None:
        super().__init__()
        make = FoldedConv3d if folded else Conv3d
        depth, height, width = kernels = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = depth // 2, height // 2, width // 2
        self.conv = make(
            in_channels, channels, kernels, stride, padding=padding, groups=groups, bias=False
        )
        self.norm = BatchNorm3d(channels)
        self.relu, self.gate, self.act = relu, gate, act
        # The output is larger than the input and cheap, so recomputing it pays.
        self.is_cheap = kernels == (1, 1, 1) and channels > in_channels
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            # torch's fan-out is that of a convolution without groups.
            self.conv.weight.mul_(groups**0.5)

    def forward(
        self, x: Tensor, valid: ValidFrames | None = None, shortcut: Tensor | None = None
    ) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W'] with real frames ``valid``; the shortcut is
        added before a ReLU; there is no other activation then."""
        x = recomputable(self.conv, x) if self.is_cheap else self.conv(x)
        normalise = partial(self.norm, shortcut=shortcut, relu=self.relu)
        if shortcut is not None or not (self.relu or self.act):
            # The block's output is the next block's input, which is kept in every mode.
            y: Tensor = normalise(x, valid)
            return y
        y = recomputable(normalise, x, valid)
        if self.gate is not None:
            y = recomputable(torch.mul, y, self.gate(y, valid))
        return y if self.act is None else recomputable(self.act, y)
