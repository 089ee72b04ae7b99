"""MobileNetV2 (Sandler et al. 2018) inflated to 3D, as by Köpüklü et al. (2019).

Inverted residuals: a block widens its channels sixfold, convolves each by itself (3x3x3), and
narrows them again, without an activation. The stem strides height and width, four of the stages
depth, too.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.conv_norm import ConvNorm
from dist_train.models.padding import ValidFrames
from dist_train.models.recompute import Recompute
from dist_train.models.trunk import Parts, RecomputePlan, Trunk

#: Of each stage: how much wider its blocks are inside, channels, number of blocks, first stride.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, FEATURES = 32, 1280


class InvertedResidual(nn.Module):
    """The block of the text above; a shortcut where shapes stay."""

    def __init__(self, in_channels: int, channels: int, stride: int, wider: int) -> None:
        super().__init__()
        inner, self.stride = in_channels * wider, stride
        self.conv1 = ConvNorm(in_channels, inner, 1, act=F.relu6) if wider > 1 else None
        self.conv2 = ConvNorm(inner, inner, 3, stride, groups=inner, act=F.relu6)
        self.conv3 = ConvNorm(inner, channels, 1)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(
        self, x: Tensor, before: ValidFrames | None = None, after: ValidFrames | None = None
    ) -> Tensor:
        wide = x if self.conv1 is None else self.conv1(x, before)
        shortcut = x if self.has_shortcut else None
        y: Tensor = self.conv3(self.conv2(wide, after), after, shortcut=shortcut)
        return y


class MobileNet3D(Trunk):
    """The network.

    Args:
        width: factor of the channels of all stages but the last features.
        in_channels: channels of a clip.
        outputs: logits of a clip.
        recompute: a mode of ``recompute.py``, or one mode for each of ``part_names``.
        dropout: probability of dropping a pooled feature.
    """

    part_names = ("stem", "half", "quarter", "eighth", "sixteenth", "last")
    frame_stride = 16

    def __init__(
        self,
        *,
        width: float = 1.0,
        in_channels: int = 1,
        outputs: int = 1,
        recompute: Recompute | RecomputePlan = "none",
        dropout: float = 0.2,
    ) -> None:
        super().__init__(in_channels, recompute)
        channels = max(1, round(STEM * width))
        self.stem = ConvNorm(in_channels, channels, 3, (1, 2, 2), act=F.relu6)
        self.blocks = nn.ModuleList()
        for wider, unscaled, repeat, stride in STAGES:
            out = max(1, round(unscaled * width))
            for number in range(repeat):
                first = stride if number == 0 else 1
                self.blocks.append(InvertedResidual(channels, out, first, wider))
                channels = out
        self.last = ConvNorm(channels, FEATURES, 1, act=F.relu6)
        self._add_head(FEATURES, outputs, dropout)

    def parts(self, valid: ValidFrames | None = None) -> Parts:
        # By size: 1 block and 2 more, then 3, 4 + 3 and 3 + 1.
        blocks, last = self._block_parts(valid, (3, 3, 7, 4))
        return [
            [partial(self.stem, valid=valid)],
            *blocks,
            [partial(self.last, valid=last)],
        ], last
