"""Steps sized by a voxel budget: runs of neighbouring blocks."""

from __future__ import annotations

import numpy as np

from dist_train.data.plan.depth_bins import DepthBins
from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.positives import PositiveOrder
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints


def longest_run(positives: ByDepth, negatives: ByDepth, rules: PlanRules) -> int:
    """The most blocks of a step.

    Limited by the budget at the shallowest depth, and by the negatives, which must all differ.
    """
    shallowest = min(depths[0] for depths in (positives.depths, negatives.depths) if len(depths))
    assert rules.max_voxels is not None
    room = rules.max_voxels // (rules.batch * int(shallowest) * rules.frame_voxels)
    block = rules.batch // rules.ratio.group * rules.ratio.negatives
    return max(1, min(room, (len(negatives) // 2 + 1) // block))


def run_edges(
    blocks: int,
    longest: int,
    order: PositiveOrder,
    negatives: ByDepth,
    bins: DepthBins,
    rules: PlanRules,
) -> Ints:
    """Edges of the runs in a pass of ``blocks`` whole blocks: int64 [runs + 1].

    The edges must not depend on the epoch, so that the first step of an epoch has a formula.
    Therefore each block counts with the greatest depth that it can have in any epoch: positives
    shifted up by a whole window, and the deepest bin that its negatives can come from.

    Args:
        longest: the most blocks of a run (``longest_run``).
    """
    epochs = order.epochs
    number = np.arange(1, blocks + 1)
    before = np.where(number > order.split, epochs.count - blocks * epochs.per_block, 0)
    last = np.minimum(number * epochs.per_block + before + order.window - 2, epochs.count - 1)
    slots = rules.ratio.negatives_of(number * epochs.per_block + before)
    first_slots = bins.quotas.ends // bins.quotas.cycle
    bin_ = np.searchsorted(first_slots[:-1], slots, side="right") - 1
    deepest = np.maximum(order.clips.depth_at(last), negatives.depth_at(bins.starts[bin_ + 1] - 1))
    assert rules.max_voxels is not None
    room = rules.max_voxels // (rules.batch * rules.frame_voxels * deepest)
    edges = [0]
    for block, most in enumerate(np.minimum(room, longest).tolist()):
        # The tail and the head lie between two runs, not within one.
        if block > edges[-1] and (block + 1 - edges[-1] > most or block == order.split):
            edges.append(block)
    return np.array([*edges, blocks])
