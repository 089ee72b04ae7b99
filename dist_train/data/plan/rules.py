"""The rules of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_train.class_ratio import ClassRatio

#: Depths of the negatives. "matched": like those of the positives. "natural": as in the data.
Matching = Literal["matched", "natural"]


@dataclass(frozen=True)
class PlanRules:
    """The rules of a plan.

    Attributes:
        batch: clips of a block, a multiple of p + q.
        ratio: positives to negatives, p:q.
        seed: seed of the order.
        matching: see ``Matching``.
        max_voxels: the most voxels of a step: clips x greatest depth x ``frame_voxels``. A step
            takes as many neighbouring blocks as fit, and at least one. None: a step is a block.
        frame_voxels: voxels of one frame of one clip at the model's input.
    """

    batch: int
    ratio: ClassRatio
    seed: int
    matching: Matching = "matched"
    max_voxels: int | None = None
    frame_voxels: int = 1

    @property
    def positives(self) -> int:
        """Positives of a block."""
        return self.batch // self.ratio.group * self.ratio.positives

    @property
    def negatives(self) -> int:
        """Negatives of a block."""
        return self.batch // self.ratio.group * self.ratio.negatives
