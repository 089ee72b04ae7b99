"""ConvNeXt-T (Liu et al. 2022) with depthwise convolutions in 3D.

Layer normalisation of each voxel by itself needs no batch, so that small batches and unequal
processes cost nothing. For clips of D frames of H x W pixels:

    layer       kernel    stride     output                          channels
    stem        3x4x4     2, 4, 4    D/2 x H/4  x W/4                96
    stage 1     3x7x7                D/2 x H/4  x W/4                96
    stage 2     1x2x2     1, 2, 2    D/2 x H/8  x W/8               192
    stage 3     1x2x2     1, 2, 2    D/2 x H/16 x W/16              384
    stage 4     1x2x2     1, 2, 2    D/2 x H/32 x W/32              768
    average over real voxels, layer normalisation, linear            outputs
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.layers import Conv3d
from dist_train.models.padding import ValidFrames, clear_padding, strided
from dist_train.models.recompute import Recompute, Step
from dist_train.models.rematerialize import recomputable
from dist_train.models.trunk import Parts, RecomputePlan, Trunk

REPEATS, WIDTHS = (3, 3, 9, 3), (96, 192, 384, 768)
STEM_STRIDE = (2, 4, 4)


class VoxelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each voxel: [B, C, D, H, W] to rows [N, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        # Of a channels-last tensor this is a view.
        rows = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1])
        return super().forward(rows).to(x.dtype)


def _voxels(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [N, C'] as [B, C', D, H, W], channels last, with the other axes of ``like``."""
    batch, _, *size = like.shape
    return rows.view(batch, *size, rows.shape[1]).permute(0, 4, 1, 2, 3)


class ConvNeXtBlock(nn.Module):
    """A 3x7x7 depthwise convolution, layer normalisation, and two linear layers of each voxel, the
    inner one four times as wide; scaled, dropped for a share of the clips, and added."""

    stride = 1

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        self.conv = Conv3d(channels, channels, (3, 7, 7), padding=(1, 3, 3), groups=channels)
        self.norm = VoxelNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop = drop

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        rows = recomputable(self.norm, self.conv(x))
        wide = recomputable(F.gelu, recomputable(self.widen, rows))
        # The sum is float32, also under autocast: fresh scales are below bfloat16's resolution.
        y = _voxels(self.narrow(wide) * self.scale, like=x)
        if self.training and self.drop > 0:
            # Stochastic depth (Huang et al. 2016), one draw a clip.
            kept = torch.rand(x.shape[0], 1, 1, 1, 1, device=x.device) >= self.drop
            y = y * (kept / (1 - self.drop))
        # Convolutions have a bias, which the frames behind a clip's last must not show.
        return clear_padding(x + y, after)


class Downsample(nn.Module):
    """Layer normalisation, and a convolution that halves height and width."""

    stride = 1

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = VoxelNorm(in_channels)
        self.conv = Conv3d(in_channels, channels, (1, 2, 2), (1, 2, 2))

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        return clear_padding(self.conv(_voxels(recomputable(self.norm, x), like=x)), after)


class ConvNeXt3D(Trunk):
    """The network of the table above.

    Args:
        width: channels of the stem; the stages have multiples of it.
        in_channels: channels of a clip.
        outputs: logits of a clip.
        recompute: a mode of ``recompute.py``, or one mode for each of ``part_names``.
        drop_path: probability with which the last block is dropped for a clip in training; those
            before it have less, in proportion.
        dropout: probability of dropping a pooled feature.
    """

    part_names = ("stem", "stage1", "stage2", "stage3", "stage4")
    frame_stride = STEM_STRIDE[0]

    def __init__(
        self,
        *,
        width: int = 96,
        in_channels: int = 1,
        outputs: int = 1,
        recompute: Recompute | RecomputePlan = "none",
        drop_path: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, recompute)
        kernel = (3, *STEM_STRIDE[1:])
        self.stem = Conv3d(in_channels, width, kernel, STEM_STRIDE, padding=(1, 0, 0))
        self.stem_norm = VoxelNorm(width)
        last = sum(REPEATS) - 1
        drops = (drop_path * number / last for number in range(last + 1))
        self.blocks = nn.ModuleList()
        for stage, repeat in enumerate(REPEATS):
            channels = width * 2**stage
            if stage > 0:
                self.blocks.append(Downsample(channels // 2, channels))
            self.blocks.extend(ConvNeXtBlock(channels, next(drops)) for _ in range(repeat))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self._add_head(channels, outputs, dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                # The paper cuts it off at 100 standard deviations.
                nn.init.normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def parts(self, valid: ValidFrames | None = None) -> Parts:
        valid = strided(valid, STEM_STRIDE[0])
        repeats = [repeat + (stage > 0) for stage, repeat in enumerate(REPEATS)]
        parts, last = self._block_parts(valid, repeats)
        stem: list[Step] = [partial(self._run_stem, valid=valid)]
        return [stem, *parts], last

    def _run_stem(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        x = self.stem(x)
        return clear_padding(_voxels(self.stem_norm(x), like=x), valid)

    def classify(self, features: Tensor) -> Tensor:
        return super().classify(self.norm(features))
