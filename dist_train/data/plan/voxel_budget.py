"""Steps sized by a voxel budget: runs of neighbouring blocks."""

from __future__ import annotations

import numpy as np

from dist_train.data.plan.depth_bins import DepthBins
from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.positives import PositiveOrder
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints


def longest_run(positives: ByDepth, negatives: ByDepth, rules: PlanRules) -> int:
    """The most blocks of a step, by the budget and by the negatives, which must all differ."""
    shallowest = min(int(clips.depths[0]) for clips in (positives, negatives) if len(clips))
    different = (len(negatives) // 2 + 1) // rules.negatives
    return max(1, min(_frames(rules) // shallowest, different))


def run_edges(
    blocks: int,
    longest: int,
    order: PositiveOrder,
    negatives: ByDepth,
    bins: DepthBins,
    rules: PlanRules,
) -> Ints:
    """Edges of the runs, of at most ``longest`` blocks, in a pass of ``blocks`` whole blocks: int64
    [runs + 1].

    The edges must not depend on the epoch, so that the first step of an epoch has a formula.
    Therefore each block counts with the greatest depth that it can have in any epoch: positives
    shifted up by a whole window, and the deepest bin that its negatives can come from.
    """
    epochs = order.epochs
    number = np.arange(1, blocks + 1)
    before = np.where(number > order.split, epochs.count - blocks * epochs.per_block, 0)
    ends = number * epochs.per_block + before
    last = np.minimum(ends + order.window - 2, epochs.count - 1)
    first_slots = bins.quotas.ends // bins.quotas.cycle
    slots = rules.ratio.negatives_of(ends)
    bin_ends = bins.starts[np.searchsorted(first_slots[:-1], slots, side="right")]
    deepest = np.maximum(order.clips.depth_at(last), negatives.depth_at(bin_ends - 1))
    edges = [0]
    for block, most in enumerate(np.minimum(_frames(rules) // deepest, longest).tolist()):
        # The tail and the head lie between two runs, not within one.
        if block > edges[-1] and (block + 1 - edges[-1] > most or block == order.split):
            edges.append(block)
    return np.array([*edges, blocks])


def _frames(rules: PlanRules) -> int:
    """Frames per clip that fit into the budget, for the clips of one block."""
    assert rules.max_voxels is not None
    return rules.max_voxels // (rules.batch * rules.frame_voxels)
