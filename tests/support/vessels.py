"""Small synthetic capillaries whose vessel is known, and a run that tells the stalled ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from array_store import array_store
from helpers import CHANGES, overrides
from torch import Tensor, nn

from dist_train.config import Config, load_config
from dist_train.data.raw.outline import Box
from dist_train.data.synthetic.drawing import ClipSpec, random_stream, render_clip, vessel_mask
from dist_train.models.norm import BatchNorm3d

SIZE, BOX, DEPTH, CLIPS = 32, 26, 12, 200
#: Clips of eight in a row.
SPLITS = (*["train"] * 6, "val", "test")


class MotionNet(nn.Module):
    """Three convolutions of a clip and of the changes from frame to frame: it learns in seconds
    what a network without them takes half an hour for."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for inner, outer, stride in ((2, width, 1), (width, 2 * width, 2), (2 * width,) * 2 + (2,)):
            conv = nn.Conv3d(inner, outer, 3, (1, stride, stride), padding=1, bias=False)
            self.layers.extend([conv, BatchNorm3d(outer), nn.ReLU()])
        self.head = nn.Linear(2 * width, 1)

    def forward(self, volumes: Tensor, frames: Tensor | None) -> Tensor:
        changes = torch.diff(volumes, dim=2, prepend=volumes[:, :, :1]).abs()
        found = self.layers(torch.cat([volumes, 4 * changes], dim=1))
        logits: Tensor = self.head(found.mean((2, 3, 4))).squeeze(1)
        return logits


def spec_of(index: int) -> ClipSpec:
    """A clip with the vessel somewhere in it."""
    top, left = random_stream(0, index, 9).integers(0, SIZE - BOX, 2, endpoint=True)
    box = Box(int(top), int(left), int(top) + BOX, int(left) + BOX)
    return ClipSpec(0, index, DEPTH, SIZE, SIZE, box)


def is_stalled(index: int) -> bool:
    return index % 2 == 0


def vessel_of(filename: str) -> np.ndarray:
    """The vessel of a clip of ``vessel_store``, bool [H, W]."""
    return vessel_mask(spec_of(int(Path(filename).stem)))


def vessel_store(folder: Path) -> Path:
    """A store of clips, half of them stalled."""
    rows = []
    for index in range(CLIPS):
        pixels = render_clip(spec_of(index), stalled=is_stalled(index)).frames[..., 1]
        split = SPLITS[index // 2 % len(SPLITS)]
        rows.append((pixels, {"label": int(is_stalled(index)), "split": split}))
    return array_store(folder, rows)


def vessel_config(store: Path, out: Path) -> Config:
    """``MotionNet`` for twelve epochs; the package "vessels" must be allowed."""
    settings = overrides(
        store,
        out,
        f"clip.size=[{SIZE}, {SIZE}]",
        "plan.batch=16",
        "plan.ratio=balanced",
        "model.name=vessels:MotionNet",
        *(f"augment.{name}=0" for name in sorted(CHANGES - {"flip"})),
        "train.epochs=12",
        "checkpoint.every_steps=1000",
        "snapshots.at=[11, 12]",
    )
    of_others = ("model.width", "model.stem_pool")
    return load_config(None, [one for one in settings if not one.startswith(of_others)])
