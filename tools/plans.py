"""A plan in one call, for benches and tests."""

from __future__ import annotations

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.plan import Plan, plan_of, sorted_classes
from dist_train.data.plan.rules import Matching, PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import Floats


def make_plan(
    positives: Ints,
    negatives: Ints,
    *,
    batch: int,
    ratio: tuple[int, int],
    seed: int,
    positive_depths: Ints | None = None,
    negative_depths: Ints | None = None,
    matching: Matching = "matched",
    weights: Floats | None = None,
    groups: Ints | None = None,
    max_voxels: int | None = None,
    frame_voxels: int = 1,
) -> Plan:
    """A plan over the clip numbers of the two classes; see ``sorted_classes`` and ``PlanRules``."""
    rules = PlanRules(batch, ClassRatio(*ratio), seed, matching, max_voxels, frame_voxels)
    classes = sorted_classes(
        positives,
        negatives,
        positive_depths=positive_depths,
        negative_depths=negative_depths,
        weights=weights,
        groups=groups,
    )
    return plan_of(*classes, rules)
