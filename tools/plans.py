"""A plan of two classes in one call, for benches and tests."""

from __future__ import annotations

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_order import by_depth
from dist_train.data.plan.plan import Plan, plan_of
from dist_train.data.plan.rules import Matching, PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import Floats


def make_plan(
    positives: Ints,
    negatives: Ints,
    *,
    batch: int,
    ratio: tuple[int, ...],
    seed: int,
    positive_depths: Ints | None = None,
    negative_depths: Ints | None = None,
    matching: Matching = "matched",
    weights: Floats | None = None,
    groups: Ints | None = None,
    max_voxels: int | None = None,
    frame_voxels: int = 1,
) -> Plan:
    """A plan over the clip numbers of two classes, int64 [count] each; see ``by_depth`` and
    ``PlanRules``. The positives are the anchor; weights and groups are of the negatives."""
    anchor = by_depth(positives, positive_depths, name="positives")
    other = by_depth(negatives, negative_depths, weights, groups, name="negatives")
    rules = PlanRules(batch, ClassRatio(ratio), seed, matching, max_voxels, frame_voxels)
    return plan_of(anchor, [other], rules)
