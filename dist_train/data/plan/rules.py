"""What is asked of a plan, and whether it can be had."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from dist_train.class_ratio import ClassRatio
from dist_train.errors import PlanError

#: "matched": the negatives have the depths of the positives. "natural": they have their own.
Matching = Literal["matched", "natural"]


@dataclass(frozen=True)
class PlanRules:
    """What is asked of a plan.

    Attributes:
        batch: clips of a block.
        ratio: positives to negatives.
        seed: keys the order.
        matching: whose depths the negatives have.
        max_voxels: None makes each block a step. Otherwise a step is as many neighbouring blocks as
            stay within it: clips x the greatest depth x ``frame_voxels``. One block is always
            allowed, also where it alone exceeds the budget.
        frame_voxels: voxels of one frame of one clip, as it reaches the model.
    """

    batch: int
    ratio: ClassRatio
    seed: int
    matching: Matching = "matched"
    max_voxels: int | None = None
    frame_voxels: int = 1


def check_rules(rules: PlanRules, positives: int) -> None:
    """Raise ``PlanError`` for rules that contradict themselves, or need more positives."""
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
            f"negatives cannot be '{rules.matching}'",
            where="plan.negatives",
            fix=f"Use one of {', '.join(get_args(Matching))}.",
        )
    if rules.frame_voxels < 1 or (rules.max_voxels is not None and rules.max_voxels < 1):
        raise PlanError("a voxel budget must be at least 1", where="plan.max_voxels")
    # A pass must have room for a block beside its own tail: positives.py says why.
    take = groups * ratio.positives
    needed = take + take - gcd(positives, take)
    if positives < needed:
        raise PlanError(
            f"the selection holds {positives} positives for train, and the batch needs {take} "
            f"different ones a step, for which at least {needed} are needed",
            fix="Lower plan.batch, or select more clips.",
        )
