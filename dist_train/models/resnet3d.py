"""ResNet in 3D for clips of unequal depth, one logit each (Hara et al. 2017, 2018).

The networks of He et al. (2016) with kernels of 3x3x3 and projection shortcuts (type B). For clips
of D frames of H x W pixels, width w and the default stem:

    layer      kernel      stride     output                        channels
    stem       7x7x7       1, 2, 2    D    x H/2  x W/2             w
    pool       3x3x3       2          D/2  x H/4  x W/4             w
    layer 1    blocks      1          D/2  x H/4  x W/4             w * expansion
    layer 2    blocks      2          D/4  x H/8  x W/8            2w * expansion
    layer 3    blocks      2          D/8  x H/16 x W/16           4w * expansion
    layer 4    blocks      2          D/16 x H/32 x W/32           8w * expansion
    average over real voxels, dropout, linear                      1
"""

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.conv import Conv3d
from dist_train.models.frames import ValidFrames, clear_padding, strided, valid_frames
from dist_train.models.norm import BatchNorm3d
from dist_train.models.pooling import global_average_pool
from dist_train.models.recompute import run_recomputed

Recompute = Literal["none", "block"]


class ConvNorm(nn.Module):
    """A convolution, with padding of half its kernel, and batch normalisation for its bias."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int | tuple[int, int, int] = 1
    ) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = BatchNorm3d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, valid: ValidFrames | None = None) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W'], of which ``valid`` are the real frames."""
        normalised: Tensor = self.norm(self.conv(x), valid)
        return normalised


class ResidualBlock(nn.Module):
    """What the two kinds of block share: ``channels * expansion`` channels out, and a shortcut.

    A block maps [B, C, D, H, W] to [B, C', D', H', W']; ``before`` and ``after`` are the real
    frames of the one and of the other.
    """

    expansion: ClassVar[int]

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        out_channels = channels * self.expansion
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = None if same_shape else ConvNorm(in_channels, out_channels, 1, stride)

    def add_shortcut(self, x: Tensor, residual: Tensor, after: ValidFrames | None) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, after)
        return F.relu(residual + shortcut)


class BasicBlock(ResidualBlock):
    """3x3x3, 3x3x3."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = ConvNorm(in_channels, channels, 3, stride)
        self.conv2 = ConvNorm(channels, channels, 3)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        residual = F.relu(self.conv1(x, after))
        residual = self.conv2(residual, after)
        return self.add_shortcut(x, residual, after)


class Bottleneck(ResidualBlock):
    """1x1x1, 3x3x3, and 1x1x1 to four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = ConvNorm(in_channels, channels, 1)
        self.conv2 = ConvNorm(channels, channels, 3, stride)
        self.conv3 = ConvNorm(channels, channels * self.expansion, 1)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        residual = F.relu(self.conv1(x, before))
        residual = F.relu(self.conv2(residual, after))
        residual = self.conv3(residual, after)
        return self.add_shortcut(x, residual, after)


BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}
"""Depth to the kind of block, and how many of them layers 1 to 4 have."""


class ResNet3D(nn.Module):
    """The table above.

    Padding in depth changes nothing: in eval mode a clip's logit is the same alone, among any
    others and at any padding; in training mode loss and gradients are those of the real frames.

    Convolutions start from Kaiming normal weights (fan-out) and normalisation from scale 1, bias 0,
    as in Hara et al. That holds for the last scale of a residual branch too: from 0 (Goyal et al.
    2017) the branch's other weights would get no gradient in the first step.

    Args:
        depth: number of layers, a key of ``BLOCKS``.
        width: channels of the stem.
        in_channels: channels of a clip.
        stem_stride: stride of the stem in D, H and W.
        stem_pool: False leaves out the pooling, so that all that follows is twice as large.
        recompute: "block" keeps only the inputs of the blocks for the backward pass, and computes
            what is inside a second time.
        dropout: probability of dropping a pooled feature.

    Raises:
        ModelError: a setting is outside of its range.
    """

    def __init__(
        self,
        depth: int = 101,
        *,
        width: int = 64,
        in_channels: int = 1,
        stem_stride: tuple[int, int, int] = (1, 2, 2),
        stem_pool: bool = True,
        recompute: Recompute = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check("depth", depth, depth in BLOCKS, f"one of {', '.join(map(str, BLOCKS))}")
        _check("width", width, width >= 1, "at least 1")
        _check("in_channels", in_channels, in_channels >= 1, "at least 1")
        strides_fit = len(stem_stride) == 3 and min(stem_stride) >= 1
        _check("stem_stride", stem_stride, strides_fit, "three numbers, each at least 1")
        _check("recompute", recompute, recompute in get_args(Recompute), '"none" or "block"')
        _check("dropout", dropout, 0.0 <= dropout < 1.0, "at least 0 and less than 1")
        self.in_channels = in_channels
        self.recompute = recompute
        self.stem_frame_stride = stem_stride[0]
        self.stem = ConvNorm(in_channels, width, 7, stem_stride)
        self.pool = nn.MaxPool3d(3, stride=2, padding=1) if stem_pool else None
        self.blocks = _stack_blocks(depth, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width * 8 * BLOCKS[depth][0].expansion, 1)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:
        """Logits [B] of clips [B, C, D, H, W].

        Args:
            x: floating point; what its padded frames hold does not matter.
            frames: integer [B], the true depth of each clip, whose real frames come first; None
                when all D are real, which is faster. Leave it on the CPU.

        Returns:
            Logits in the dtype of the parameters, also under autocast: in bfloat16, with its 8
            significant bits, clips would tie.

        Raises:
            ModelError: the clips or ``frames`` are not of the stated shape or range.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ModelError(
                f"clips are {x.dtype} {list(x.shape)}",
                fix=f"Pass floating point [B, {self.in_channels}, D, H, W]",
            )
        valid = valid_frames(frames, x)
        x = clear_padding(x, valid)
        valid = strided(valid, self.stem_frame_stride)
        x = F.relu(self.stem(x, valid))
        if self.pool is not None:
            # Zeros among rectified values are as good as the -inf that a maximum is padded with,
            # but the last real frame is also in the window of the first padded one.
            valid = strided(valid, 2)
            x = clear_padding(self.pool(x), valid)
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            before, valid = valid, strided(valid, block.stride)
            if self.recompute == "block":
                x = run_recomputed(block, x, before, valid)
            else:
                x = block(x, before, valid)
        features = self.dropout(global_average_pool(x, valid))
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(features.to(self.head.weight.dtype))
        return logits.squeeze(1)


def _stack_blocks(depth: int, width: int) -> nn.ModuleList:
    """Layers 1 to 4, one block after the other."""
    block, repeats = BLOCKS[depth]
    blocks = nn.ModuleList()
    in_channels = width
    for layer, repeat in enumerate(repeats):
        channels = width * 2**layer
        for i in range(repeat):
            halves = layer > 0 and i == 0
            blocks.append(block(in_channels, channels, stride=2 if halves else 1))
            in_channels = channels * block.expansion
    return blocks


def _check(setting: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise ModelError(f"{setting} is {value!r}", fix=f"Give {wanted}")
