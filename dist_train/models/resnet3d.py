"""3D ResNet for clips of unequal depth; one logit per clip (Hara et al. 2017, 2018).

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

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.layers import Conv3d, FoldedConv3d, global_average_pool
from dist_train.models.norm import BatchNorm3d
from dist_train.models.padding import ValidFrames, clear_padding, strided, valid_frames
from dist_train.models.recompute import Recompute, Step, run_part
from dist_train.models.rematerialize import forget, recomputable
from dist_train.models.running import batched_updates

#: One mode each for the stem (with its pooling) and layers 1 to 4.
RecomputePlan = tuple[Recompute, Recompute, Recompute, Recompute, Recompute]
PARTS = ("stem", "layer1", "layer2", "layer3", "layer4")
NOTHING_TWICE: RecomputePlan = ("none", "none", "none", "none", "none")


class ConvNorm(nn.Module):
    """Convolution without bias (padding: half the kernel), batch normalisation, optional ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int | tuple[int, int, int] = 1,
        *,
        relu: bool,
        folded: bool = False,
    ) -> None:
        super().__init__()
        make = FoldedConv3d if folded else Conv3d
        self.conv = make(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = BatchNorm3d(channels)
        self.relu = relu
        # The output is larger than the input and cheap, so recomputing it pays.
        self.is_cheap = kernel == 1 and channels > in_channels
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, x: Tensor, valid: ValidFrames | None = None, shortcut: Tensor | None = None
    ) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W'] with real frames ``valid``; the shortcut is
        added before the ReLU."""
        x = recomputable(self.conv, x) if self.is_cheap else self.conv(x)
        normalise = partial(self.norm, shortcut=shortcut, relu=self.relu)
        if self.relu and shortcut is None:
            return recomputable(normalise, x, valid)
        # The block's output is the next block's input, which is kept in every mode.
        y: Tensor = normalise(x, valid)
        return y


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


class ResNet3D(nn.Module):
    """The network of the table above.

    Padding in depth does not change results. In eval mode a clip's logit is the same alone, in any
    batch and at any padding. In training mode loss and gradients depend on real frames only.

    Initialisation follows Hara et al.: convolutions from Kaiming normal (fan-out), normalisation
    from scale 1 and bias 0.

    Args:
        depth: number of layers, a key of ``BLOCKS``.
        width: channels of the stem.
        in_channels: channels of a clip.
        stem_stride: stride of the stem in D, H and W.
        stem_pool: False leaves out the pooling; later layers are then twice as large.
        stem_border: the stem also sees a channel of ones, which ends where the clip does. So it can
            see any value in place of black around the clip.
        stem_folded: compute the stem by space to depth (layers.py). Only rounding changes.
        recompute: a mode of ``recompute.py``, or one mode for each of ``PARTS``. The attribute can
            be set at any time.
        dropout: probability of dropping a pooled feature.
    """

    def __init__(
        self,
        depth: int = 101,
        *,
        width: int = 64,
        in_channels: int = 1,
        stem_stride: tuple[int, int, int] = (1, 2, 2),
        stem_pool: bool = True,
        stem_border: bool = False,
        stem_folded: bool = False,
        recompute: Recompute | RecomputePlan = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        block, self.repeats = BLOCKS[depth]
        self.in_channels, self.recompute = in_channels, recompute
        self.stem_frame_stride = stem_stride[0]
        self.stem_border = stem_border
        seen = in_channels + int(stem_border)
        self.stem = ConvNorm(seen, width, 7, stem_stride, relu=True, folded=stem_folded)
        self.pool = nn.MaxPool3d(3, stride=2, padding=1, return_indices=True) if stem_pool else None
        self.blocks = nn.ModuleList()
        channels = width
        for layer, repeat in enumerate(self.repeats):
            for number in range(repeat):
                stride = 2 if layer > 0 and number == 0 else 1
                self.blocks.append(block(channels, width * 2**layer, stride))
                channels = width * 2**layer * block.expansion
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, 1)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:
        """Logits [B] of clips [B, C, D, H, W].

        The logits have the dtype of the parameters, also under autocast: in bfloat16, of 8
        significant bits, clips would tie.

        Args:
            x: floating point. The content of padded frames is ignored.
            frames: see ``valid_frames``. None (faster): all frames are real.

        Raises:
            ModelError: the clips or ``frames`` have another shape or range.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ModelError(
                f"clips are {x.dtype} {list(x.shape)}",
                fix=f"Pass floating point [B, {self.in_channels}, D, H, W]",
            )
        valid = valid_frames(frames, x)
        x = clear_padding(x, valid)
        modes = self.recompute if self.training else NOTHING_TWICE
        parts, valid = self.parts(valid)
        # Exporters trace eval mode, in which running statistics do not change.
        with batched_updates() if self.training else nullcontext():
            for mode, steps in zip(modes, parts, strict=True):
                x = run_part(mode, steps, x)
        features = self.dropout(global_average_pool(x, valid))
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(features.to(self.head.weight.dtype))
        return logits.squeeze(1)

    def parts(
        self, valid: ValidFrames | None = None
    ) -> tuple[list[list[Step]], ValidFrames | None]:
        """The steps of each of ``PARTS``, in order, and the real frames of the last output."""
        before, valid = valid, strided(valid, self.stem_frame_stride)
        pooled = valid if self.pool is None else strided(valid, 2)
        parts: list[list[Step]] = [
            [partial(self._run_stem, before=before, valid=valid, pooled=pooled)]
        ]
        valid, blocks = pooled, iter(self.blocks)
        for repeat in self.repeats:
            steps: list[Step] = []
            for block in islice(blocks, repeat):
                assert isinstance(block, ResidualBlock)
                before, valid = valid, strided(valid, block.stride)
                steps.append(partial(block, before=before, after=valid))
            parts.append(steps)
        return parts, valid

    @property
    def recompute(self) -> RecomputePlan:
        """A mode of ``recompute.py`` for each of ``PARTS``. Assign one mode to set all."""
        return self._recompute

    @recompute.setter
    def recompute(self, modes: Recompute | RecomputePlan) -> None:
        known = get_args(Recompute)
        plan = (modes,) * len(PARTS) if isinstance(modes, str) else tuple(modes)
        if len(plan) != len(PARTS) or not set(known).issuperset(plan):
            raise ModelError(
                f"recompute is {modes!r}",
                fix=f"Give one of {', '.join(known)}, or one for each of {', '.join(PARTS)}",
            )
        self._recompute = cast(RecomputePlan, plan)

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
