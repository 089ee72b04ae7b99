"""Test-time augmentation: the views of a clip over which its probability is averaged."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.config import AugmentSettings
from dist_train.errors import ConfigError

Tta = Literal["none", "flips"]


class View(NamedTuple):
    """Which axes of a clip are reversed."""

    depth: bool
    height: bool
    width: bool


def views_of(tta: Tta, augment: AugmentSettings) -> list[View]:
    """The views of a clip, of which the first is the clip itself.

    "flips" has all combinations of the mirrorings that the run was trained with: of height and
    width (``augment.flip``), and the reversal of depth (``augment.reverse``).

    Raises:
        ConfigError: the run was trained with none of them.
    """
    if tta == "none":
        return [View(False, False, False)]
    flip, reverse = ((False, True) if p > 0 else (False,) for p in (augment.flip, augment.reverse))
    views = [View(*axes) for axes in product(reverse, flip, flip)]
    if len(views) == 1:
        raise ConfigError(
            "the run was trained without mirrored and reversed clips (augment.flip, "
            "augment.reverse), so it does not know them",
            where="--tta flips",
            fix="Leave it out.",
        )
    return views


class Viewed(nn.Module):
    """A model that sees a view of each clip. Padding stays behind the real frames."""

    def __init__(self, model: nn.Module, view: View) -> None:
        super().__init__()
        self.model, self.view = model, view

    def forward(self, volumes: Tensor, frames: Tensor | None) -> Tensor:
        """As the model's, for volumes [B, C, D, H, W] and int64 frames [B] on the host."""
        axes = [axis for axis, is_flipped in ((3, self.view.height), (4, self.view.width))
                if is_flipped]  # fmt: skip
        if axes:
            volumes = volumes.flip(axes)
        if self.view.depth:
            volumes = volumes.flip(2) if frames is None else _reversed(volumes, frames)
        logits: Tensor = self.model(volumes, frames)
        return logits


def _reversed(volumes: Tensor, frames: Tensor) -> Tensor:
    """Each clip's real frames in reverse, and then its padding."""
    place = torch.arange(volumes.shape[2])
    last = frames[:, None] - 1
    index = torch.where(place <= last, last - place, place).to(volumes.device)
    return torch.stack([clip[:, own] for clip, own in zip(volumes, index, strict=True)])
