"""ResNets as their papers describe them, in 2D and 3D, by the names of tensors in their files.

He et al. 2016 (blocks), Hara et al. 2017 (kernels of 3x3x3), Chen et al. 2019 (dilated layers),
Tran et al. 2018 (mixed kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Block(nn.Module):
    def __init__(
        self, dims: int, inside: int, width: int, *, bottleneck: bool, kernel: Sequence[int],
        stride: Sequence[int], dilation: int,
    ) -> None:  # fmt: skip
        super().__init__()
        out = width * 4 if bottleneck else width
        widths = [inside, width, width, out] if bottleneck else [inside, width, out]
        strided = 2 if bottleneck else 1
        self.number = len(widths) - 1
        for i, (before, after) in enumerate(pairwise(widths), 1):
            size = [1] * dims if bottleneck and i != 2 else list(kernel)
            conv = CONV[dims](
                before, after, size, stride=tuple(stride) if i == strided else 1, dilation=dilation,
                padding=[dilation * (k // 2) for k in size], bias=False,
            )  # fmt: skip
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", NORM[dims](after))
        if inside != out or max(stride) > 1:
            shortcut = CONV[dims](inside, out, 1, stride=tuple(stride), bias=False)
            self.downsample = nn.Sequential(shortcut, NORM[dims](out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        for i in range(1, self.number + 1):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
            x = x if i == self.number else F.relu(x)
        return F.relu(x + shortcut)


class OriginalResNet(nn.Module):
    """Takes normalised clips [B, C, D, H, W], or images [B, C, H, W].

    Attributes:
        border: value of each channel, around the clip; zeros in all originals.
    """

    def __init__(
        self, repeats: Sequence[int], *, dims: int = 3, width: int = 4, channels: int = 3,
        outputs: int = 1, bottleneck: bool = False, stem: Sequence[int] = (7, 7, 7),
        stem_stride: Sequence[int] = (1, 2, 2), pool: bool = True,
        kernels: Sequence[Sequence[int]] = ((3, 3, 3),) * 4,
        strides: Sequence[Sequence[int]] = ((1, 1, 1), *((2, 2, 2),) * 3),
        dilations: Sequence[int] = (1, 1, 1, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.border = [0.0] * channels
        self.pads = [k // 2 for k in reversed(stem[-dims:]) for _ in range(2)]
        self.conv1 = CONV[dims](
            channels, width, tuple(stem[-dims:]), tuple(stem_stride[-dims:]), bias=False
        )
        self.bn1 = NORM[dims](width)
        self.pool = {2: F.max_pool2d, 3: F.max_pool3d}[dims] if pool else None
        inside = width
        for k, repeat in enumerate(repeats):
            blocks = []
            for number in range(repeat):
                stride = strides[k] if number == 0 else (1, 1, 1)
                how = {"kernel": kernels[k][-dims:], "stride": stride[-dims:]}
                blocks.append(
                    Block(
                        dims,
                        inside,
                        width * 2**k,
                        bottleneck=bottleneck,
                        dilation=dilations[k],
                        **how,
                    )
                )
                inside = width * 2**k * (4 if bottleneck else 1)
            self.add_module(f"layer{k + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inside, outputs)

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution."""
        border = zip(x.unbind(1), self.border, strict=True)
        return self.conv1(torch.stack([F.pad(c, self.pads, value=v) for c, v in border], 1))

    def features(self, x: Tensor, layers: int = 4) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = x if self.pool is None else self.pool(x, 3, 2, 1)
        for k in range(1, layers + 1):
            x = self.get_submodule(f"layer{k}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(2).mean(2))
