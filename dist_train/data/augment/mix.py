"""Mixes the clips of a group with each other: mixup (Zhang, Cisse, Dauphin and Lopez-Paz, ICLR
2018) and CutMix (Yun et al., ICCV 2019) in space and depth.

A group is the p + q clips of the plan's ratio. Ranks and micro-batches are cut between groups, so
pairs and draws are the same however a step is cut. Clip i of a group gets a part of clip i + shift,
counted around. So each clip gives to one other, and with equal depths the sum of a group's labels
stays.

Clips are mixed in the frames that both have, from the first one on. Frames of a longer clip beyond
that stay its own, and padding is never mixed in. Labels are mixed by the content that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train.config import AugmentSettings

# Keeps the draws apart from others of the same seed.
_KEY = 0x6D6978
_AXES = {"both": (0, 1, 2), "space": (1, 2), "depth": (0,)}
#: The start of a box and its length, as shares of the frames, rows and columns.
Sides = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class MixDraw:
    """How the clips of a group are mixed.

    Attributes:
        shift: clip i gets from clip i + shift.
        share: of the clip itself in mixed voxels; 0 within a box.
        box: where clips are mixed; None is everywhere.
    """

    shift: int
    share: float
    box: Sides | None = None


class MixSampler:
    """Draws how a group is mixed, keyed by (seed, step, its clips).

    Args:
        settings: probabilities, and the distribution of shares.
        seed: the run's seed.
    """

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        self._settings, self._seed = settings, seed

    def __call__(self, clips: Sequence[int], *, step: int) -> MixDraw | None:
        """The draw for the clips of a group at a step; None leaves them as they are."""
        s = self._settings
        random = np.random.default_rng((_KEY, self._seed, step, *clips))
        choice, shift = random.random(), int(random.integers(1, len(clips)))
        if choice >= s.mixup + s.cutmix:
            return None
        alpha = s.mixup_alpha if choice < s.mixup else s.cutmix_alpha
        share = float(random.beta(alpha, alpha))
        # The clip itself has the greater part. Its partner is as likely to be any other, so that
        # this changes no chance of a mix, but each label belongs to its clip.
        share = max(share, 1 - share)
        if choice < s.mixup:
            return MixDraw(shift, share)
        axes = _AXES[s.cutmix_axes]
        side = (1 - share) ** (1 / len(axes))
        starts = random.random(3) * (1 - side)
        z, y, x = ((float(starts[axis]), side) if axis in axes else (0.0, 1.0) for axis in range(3))
        return MixDraw(shift, 0.0, (z, y, x))


def whole_group(settings: AugmentSettings, group: int) -> int:
    """Number of clips that must be in one micro-batch: a group of the plan, or, where clips are
    mixed at the natural ratio, whose groups are single clips, a pair.

    Args:
        group: clips of a group of the plan.
    """
    return max(group, 2) if settings.mixup + settings.cutmix > 0 else group


@torch.no_grad()
def mix(
    volumes: Tensor, depths: Sequence[int], draws: Sequence[MixDraw | None]
) -> tuple[Tensor, Tensor]:
    """Mix groups of equal size, one draw each, in place.

    Args:
        volumes: float32 [B, C, D, H, W], zero-padded in depth.
        depths: the true depth of each clip.

    Returns:
        The partner of each clip, int64 [B], and the clip's own share of its content, float32 [B];
        on the host.
    """
    partners, shares = np.arange(len(depths)), np.ones(len(depths), np.float32)
    size = len(depths) // len(draws)
    for number, draw in enumerate(draws):
        if draw is None:
            continue
        first = number * size
        before = volumes[first : first + size].clone()
        for place in range(size):
            other = (place + draw.shift) % size
            own = first + place
            common = min(depths[own], depths[first + other])
            region, part = _region(draw, (common, *volumes.shape[3:]))
            volumes[own][:, *region].lerp_(before[other][:, *region], 1 - draw.share)
            partners[own] = first + other
            shares[own] = 1 - (1 - draw.share) * part * common / depths[own]
    return torch.from_numpy(partners), torch.from_numpy(shares)


def mixed(scores: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Scores of clips, [B] or [B, K], mixed as ``mix`` says."""
    shares = shares if scores.ndim == 1 else shares[:, None]
    return scores * shares + scores[partners] * (1 - shares)


def _region(draw: MixDraw, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], float]:
    """The box in whole voxels of a clip [D, H, W], and its share of the clip."""
    if draw.box is None:
        return (*(slice(0, length) for length in shape),), 1.0
    edges = [
        (round(start * length), round((start + side) * length))
        for (start, side), length in zip(draw.box, shape, strict=True)
    ]
    part = np.prod([(end - start) / n for (start, end), n in zip(edges, shape, strict=True)])
    return tuple(slice(*edge) for edge in edges), float(part)
