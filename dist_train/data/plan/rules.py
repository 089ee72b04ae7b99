"""The rules of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_train.class_ratio import ClassRatio

#: Depths of the clips of all classes but the anchor. "matched": like those of the anchor.
#: "natural": as in the data.
Matching = Literal["matched", "natural"]


@dataclass(frozen=True)
class PlanRules:
    """The rules of a plan. Fingerprints contain their ``repr``.

    Attributes:
        batch: clips of a block, a multiple of the ratio's group.
        ratio: clips of each class in a group, the anchor first.
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

    def clips_of(self, number: int) -> int:
        """Clips of class ``number`` in a block."""
        return self.batch // self.ratio.group * self.ratio[number]
