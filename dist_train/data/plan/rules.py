"""The rules of a plan, and the check that they can be met."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from dist_train.class_ratio import ClassRatio
from dist_train.errors import PlanError

#: Depths of the negatives. "matched": like those of the positives. "natural": as in the data.
Matching = Literal["matched", "natural"]


@dataclass(frozen=True)
class PlanRules:
    """The rules of a plan.

    Attributes:
        batch: clips of a block.
        ratio: positives to negatives.
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


def check_rules(rules: PlanRules, positives: int) -> None:
    """Raise ``PlanError`` if the rules contradict each other or need more positives."""
    ratio = rules.ratio
    groups, rest = divmod(rules.batch, ratio.group)
    if rest or groups < 1:
        raise PlanError(
            f"plan.batch {rules.batch} cannot hold {ratio.positives} positive to "
            f"{ratio.negatives} negatives",
            fix=f"Use a multiple of {ratio.group}.",
        )
    if rules.matching not in get_args(Matching):
        raise PlanError(
            f"'{rules.matching}' is unknown",
            where="plan.negatives",
            fix=f"Use one of {', '.join(get_args(Matching))}.",
        )
    if rules.frame_voxels < 1 or (rules.max_voxels is not None and rules.max_voxels < 1):
        raise PlanError("a voxel budget must be at least 1", where="plan.max_voxels")
    # A pass must be longer than a block and its longest tail: see positives.py.
    per_block = groups * ratio.positives
    needed = 2 * per_block - gcd(positives, per_block)
    if positives < needed:
        raise PlanError(
            f"the train split has {positives} positives; a batch with {per_block} different "
            f"positives needs at least {needed}",
            fix="Lower plan.batch, or select more clips.",
        )
