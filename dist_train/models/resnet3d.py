"""3D ResNet for clips of unequal depth (Hara et al. 2017, 2018).

The networks of He et al. (2016) with kernels of 3x3x3 and projection shortcuts (type B). For clips
of D frames of H x W pixels, width w and the default stem:

    layer      kernel      stride     output                        channels
    stem       7x7x7       1, 2, 2    D    x H/2  x W/2             w
    pool       3x3x3       2          D/2  x H/4  x W/4             w
    layer 1    blocks      1          D/2  x H/4  x W/4             w * expansion
    layer 2    blocks      2          D/4  x H/8  x W/8            2w * expansion
    layer 3    blocks      2          D/8  x H/16 x W/16           4w * expansion
    layer 4    blocks      2          D/16 x H/32 x W/32           8w * expansion
    average over real voxels, dropout, linear                      outputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from dist_train.models.conv_norm import ConvNorm
from dist_train.models.padding import ValidFrames, clear_padding, strided
from dist_train.models.recompute import Recompute
from dist_train.models.rematerialize import forget
from dist_train.models.trunk import Parts, RecomputePlan, Trunk


class ResidualBlock(nn.Module):
    """Base of both kinds of block: ``channels * expansion`` output channels, and a shortcut.

    A block maps [B, C, D, H, W] to [B, C', D', H', W']. ``before`` and ``after`` are the real
    frames of its input and of its output.
    """

    expansion: ClassVar[int]

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        out_channels = channels * self.expansion
        self.shortcut: ConvNorm | None = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride, relu=False)

    def project(self, x: Tensor, after: ValidFrames | None) -> Tensor:
        """The shortcut branch: identity, or a 1x1x1 projection."""
        return x if self.shortcut is None else cast(Tensor, self.shortcut(x, after))


class BasicBlock(ResidualBlock):
    """Two 3x3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = ConvNorm(in_channels, channels, 3, stride, relu=True)
        self.conv2 = ConvNorm(channels, channels, 3, relu=True)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        residual = self.conv1(x, after)
        y: Tensor = self.conv2(residual, after, shortcut=self.project(x, after))
        return y


class Bottleneck(ResidualBlock):
    """1x1x1, 3x3x3 and 1x1x1 convolutions; the last has four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = ConvNorm(in_channels, channels, 1, relu=True)
        self.conv2 = ConvNorm(channels, channels, 3, stride, relu=True)
        self.conv3 = ConvNorm(channels, channels * self.expansion, 1, relu=True)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        residual = self.conv1(x, before)
        residual = self.conv2(residual, after)
        y: Tensor = self.conv3(residual, after, shortcut=self.project(x, after))
        return y


BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}
"""Depth -> (block class, number of blocks in layers 1 to 4)."""


def residual_layers(
    block: Callable[[int, int, int], ResidualBlock],
    expansion: int,
    repeats: Sequence[int],
    width: int,
) -> tuple[nn.ModuleList, int]:
    """The blocks of all layers in order, and the channels of the last one (He et al. 2016). The
    first block of each layer but the first has a stride of 2.

    Args:
        block: makes a block of input channels, channels and stride.
        expansion: output channels of a block, as a multiple of its channels.
        repeats: blocks of each layer.
        width: input channels, and channels of layer 1; each layer has twice those of the one
            before.
    """
    blocks, channels = nn.ModuleList(), width
    for layer, repeat in enumerate(repeats):
        for number in range(repeat):
            stride = 2 if layer > 0 and number == 0 else 1
            blocks.append(block(channels, width * 2**layer, stride))
            channels = width * 2**layer * expansion
    return blocks, channels


class ResNet3D(Trunk):
    """The network of the table above.

    Initialisation follows Hara et al.: convolutions from Kaiming normal (fan-out), normalisation
    from scale 1 and bias 0.

    Args:
        depth: number of layers, a key of ``BLOCKS``.
        width: channels of the stem.
        in_channels: channels of a clip.
        outputs: logits of a clip.
        stem_stride: stride of the stem in D, H and W.
        stem_pool: False leaves out the pooling; later layers are then twice as large.
        stem_border: the stem also sees a channel of ones, which ends where the clip does. So it can
            see any value in place of black around the clip.
        stem_folded: compute the stem by space to depth (layers.py). Only rounding changes.
        recompute: a mode of ``recompute.py``, or one mode for each of ``part_names``. The attribute
            can be set at any time.
        dropout: probability of dropping a pooled feature.
    """

    part_names = ("stem", "layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        depth: int = 101,
        *,
        width: int = 64,
        in_channels: int = 1,
        outputs: int = 1,
        stem_stride: tuple[int, int, int] = (1, 2, 2),
        stem_pool: bool = True,
        stem_border: bool = False,
        stem_folded: bool = False,
        recompute: Recompute | RecomputePlan = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, recompute)
        block, self.repeats = BLOCKS[depth]
        self.stem_frame_stride = stem_stride[0]
        self.stem_border = stem_border
        seen = in_channels + int(stem_border)
        self.stem = ConvNorm(seen, width, 7, stem_stride, relu=True, folded=stem_folded)
        self.pool = nn.MaxPool3d(3, stride=2, padding=1, return_indices=True) if stem_pool else None
        self.blocks, channels = residual_layers(block, block.expansion, self.repeats, width)
        self._add_head(channels, outputs, dropout)

    @property
    def frame_stride(self) -> int:
        return 16 * self.stem_frame_stride

    def parts(self, valid: ValidFrames | None = None) -> Parts:
        before, valid = valid, strided(valid, self.stem_frame_stride)
        pooled = valid if self.pool is None else strided(valid, 2)
        parts, last = self._block_parts(pooled, self.repeats)
        stem = partial(self._run_stem, before=before, valid=valid, pooled=pooled)
        return [[stem], *parts], last

    def _run_stem(
        self,
        x: Tensor,
        before: ValidFrames | None,
        valid: ValidFrames | None,
        pooled: ValidFrames | None,
    ) -> Tensor:
        if self.stem_border:
            x = torch.cat([x, clear_padding(torch.ones_like(x[:, :1]), before)], 1)
        x = self.stem(x, valid)
        pool = self.pool
        if pool is None:
            return x
        y, indices = pool(x)
        forget(indices, lambda x: pool(x)[1], x)
        # After a ReLU, zero padding gives the same maximum as -inf. The first padded output frame
        # must still be cleared: its window holds the last real frame.
        return clear_padding(y, pooled)
