"""R(2+1)D: 3D ResNets whose convolutions are split in space and depth (Tran et al. 2018).

A convolution of 3x3x3 becomes one of 1x3x3 to M channels, batch normalisation, a ReLU, and one of
3x1x1. M is such that there are as many weights as before. The network of 18 layers is torchvision's
``r2plus1d_18``: both convolutions of a block have the M of the first. There is no pooling behind
the stem, and layers 2 to 4 halve depth, height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from dist_train.models.conv_norm import ConvNorm
from dist_train.models.padding import ValidFrames
from dist_train.models.recompute import Recompute, Step
from dist_train.models.resnet3d import BLOCKS, ResidualBlock, residual_layers
from dist_train.models.trunk import Parts, RecomputePlan, Trunk

DEPTHS = (18, 34, 50)


def middle_channels(in_channels: int, channels: int) -> int:
    """M of a 3x3x3 convolution (Tran et al., section 3.5)."""
    return 27 * in_channels * channels // (9 * in_channels + 3 * channels)


class SplitConv(nn.Module):
    """1x3x3 and 3x1x1 convolutions, each with batch normalisation; a ReLU between them, and one
    last if ``relu``."""

    def __init__(
        self, in_channels: int, middle: int, channels: int, stride: int, *, relu: bool
    ) -> None:
        super().__init__()
        space = (1, stride, stride)
        self.space = ConvNorm(in_channels, middle, (1, 3, 3), space, relu=True)
        self.depth = ConvNorm(middle, channels, (3, 1, 1), (stride, 1, 1), relu=relu)

    def forward(
        self,
        x: Tensor,
        before: ValidFrames | None,
        after: ValidFrames | None,
        shortcut: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = self.depth(self.space(x, before), after, shortcut=shortcut)
        return y


class SplitBasicBlock(ResidualBlock):
    """Two split convolutions."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int, *, one_middle: bool) -> None:
        super().__init__(in_channels, channels, stride)
        middle = middle_channels(in_channels, channels)
        second = middle if one_middle else middle_channels(channels, channels)
        self.conv1 = SplitConv(in_channels, middle, channels, stride, relu=True)
        self.conv2 = SplitConv(channels, second, channels, 1, relu=True)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        residual = self.conv1(x, before, after)
        y: Tensor = self.conv2(residual, after, after, shortcut=self.project(x, after))
        return y


class SplitBottleneck(ResidualBlock):
    """A 1x1x1, a split and a 1x1x1 convolution; the last has four times the channels."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        middle = middle_channels(channels, channels)
        self.conv1 = ConvNorm(in_channels, channels, 1, relu=True)
        self.conv2 = SplitConv(channels, middle, channels, stride, relu=True)
        self.conv3 = ConvNorm(channels, channels * self.expansion, 1, relu=True)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        residual = self.conv2(self.conv1(x, before), before, after)
        y: Tensor = self.conv3(residual, after, shortcut=self.project(x, after))
        return y


class R2Plus1D(Trunk):
    """The network.

    Args:
        depth: number of layers, of ``DEPTHS``.
        width: channels of layer 1; the others have multiples of it.
        in_channels: channels of a clip.
        outputs: logits of a clip.
        recompute: a mode of ``recompute.py``, or one mode for each of ``part_names``.
        dropout: probability of dropping a pooled feature.
    """

    part_names = ("stem", "layer1", "layer2", "layer3", "layer4")
    frame_stride = 8

    def __init__(
        self,
        depth: int,
        *,
        width: int = 64,
        in_channels: int = 1,
        outputs: int = 1,
        recompute: Recompute | RecomputePlan = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, recompute)
        of_resnet, self.repeats = BLOCKS[depth]
        block: Callable[..., ResidualBlock] = SplitBottleneck
        if of_resnet.expansion == 1:
            block = partial(SplitBasicBlock, one_middle=depth == 18)
        # 45 of torchvision's 64 channels.
        middle = 45 * width // 64
        self.stem = nn.ModuleList(
            [
                ConvNorm(in_channels, middle, (1, 7, 7), (1, 2, 2), relu=True),
                ConvNorm(middle, width, (3, 1, 1), relu=True),
            ]
        )
        expansion = of_resnet.expansion
        self.blocks, channels = residual_layers(block, expansion, self.repeats, width)
        self._add_head(channels, outputs, dropout)

    def parts(self, valid: ValidFrames | None = None) -> Parts:
        stem: list[Step] = [partial(conv, valid=valid) for conv in self.stem]
        parts, valid = self._block_parts(valid, self.repeats)
        return [stem, *parts], valid
