"""X3D: small 3D networks of depthwise convolutions (Feichtenhofer 2020).

A block widens its channels, convolves each by itself (3x3x3), weighs them by squeeze and excitation
(every other block), and narrows them again. Depth is never strided. X3D-XS, S and M are one network
for clips of 4 x 160, 13 x 160 and 16 x 224 frames x pixels; L has more blocks.
"""

from __future__ import annotations

from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.conv_norm import ConvNorm
from dist_train.models.layers import Conv3d, global_average_pool
from dist_train.models.padding import ValidFrames
from dist_train.models.recompute import Recompute, Step
from dist_train.models.trunk import Parts, RecomputePlan, Trunk

#: Factor of the number of blocks, by size (the paper's gamma_d; its table 3).
DEPTH_FACTORS = {"xs": 2.2, "s": 2.2, "m": 2.2, "l": 5.0}
#: Blocks of the four stages before they are multiplied by that factor.
REPEATS = (1, 2, 5, 3)
#: Channels within a block for each of its output (gamma_b).
WIDER = 2.25


def eighths(channels: float) -> int:
    """A number of channels rounded to a multiple of 8, at least 8, and not down by over 10 %."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SqueezeExcite(nn.Module):
    """Factors of 0 to 1 for channels, from their means over real voxels (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        """Map [B, C, D, H, W] to [B, C, 1, 1, 1] in its dtype."""
        means = global_average_pool(x, valid).to(self.squeeze.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            factors = torch.sigmoid(self.excite(F.relu(self.squeeze(means))))
        return factors.to(x.dtype)[:, :, None, None, None]


class X3DBlock(nn.Module):
    """The block of the text above, with a shortcut."""

    stride = 1  # in depth

    def __init__(self, in_channels: int, channels: int, stride: int, *, excited: bool) -> None:
        super().__init__()
        inner = int(WIDER * channels)
        self.conv1 = ConvNorm(in_channels, inner, 1, relu=True)
        gate = SqueezeExcite(inner, eighths(inner / 16)) if excited else None
        self.conv2 = ConvNorm(
            inner, inner, 3, (1, stride, stride), groups=inner, gate=gate, act=F.silu
        )
        self.conv3 = ConvNorm(inner, channels, 1, relu=True)
        # As in the authors' code: a projection is normalised only where it changes the channels.
        self.shortcut: nn.Module | None = None
        if in_channels != channels:
            self.shortcut = ConvNorm(in_channels, channels, 1, (1, stride, stride))
        elif stride > 1:
            space = (1, stride, stride)
            self.shortcut = Conv3d(in_channels, channels, 1, space, bias=False)

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        y = self.conv2(self.conv1(x, before), after)
        shortcut = x
        if isinstance(self.shortcut, ConvNorm):
            shortcut = self.shortcut(x, after)
        elif self.shortcut is not None:
            shortcut = self.shortcut(x)
        out: Tensor = self.conv3(y, after, shortcut=shortcut)
        return out


class X3D(Trunk):
    """The network.

    Args:
        size: a key of ``DEPTH_FACTORS``.
        width: channels of the stem and stage 1, 24 in the paper; later stages double them.
        in_channels: channels of a clip.
        outputs: logits of a clip.
        recompute: a mode of ``recompute.py``, or one mode for each of ``part_names``.
        dropout: probability of dropping a feature before the last layer.
    """

    part_names = ("stem", "stage1", "stage2", "stage3", "stage4", "last")
    frame_stride = 1

    def __init__(
        self,
        size: str,
        *,
        width: int = 24,
        in_channels: int = 1,
        outputs: int = 1,
        recompute: Recompute | RecomputePlan = "none",
        dropout: float = 0.5,
    ) -> None:
        super().__init__(in_channels, recompute)
        self.repeats = tuple(ceil(DEPTH_FACTORS[size] * repeat) for repeat in REPEATS)
        space = (1, 2, 2)
        self.stem_space = Conv3d(
            in_channels, width, (1, 3, 3), space, padding=(0, 1, 1), bias=False
        )
        self.stem = ConvNorm(width, width, (5, 1, 1), groups=width, relu=True)
        self.blocks = nn.ModuleList()
        channels = width
        for stage, repeat in enumerate(self.repeats):
            for number in range(repeat):
                stride, excited = (2 if number == 0 else 1), number % 2 == 0
                self.blocks.append(X3DBlock(channels, width * 2**stage, stride, excited=excited))
                channels = width * 2**stage
        features = int(WIDER * channels)
        self.last = ConvNorm(channels, features, 1, relu=True)
        self.hidden = nn.Linear(features, 2048, bias=False)
        self._add_head(2048, outputs, dropout)

    def parts(self, valid: ValidFrames | None = None) -> Parts:
        stem: list[Step] = [self.stem_space, partial(self.stem, valid=valid)]
        parts, valid = self._block_parts(valid, self.repeats)
        return [stem, *parts, [partial(self.last, valid=valid)]], valid

    def classify(self, features: Tensor) -> Tensor:
        return super().classify(F.relu(self.hidden(features)))
