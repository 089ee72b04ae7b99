"""Steps that are sized by a voxel budget: how many neighbouring blocks each may take."""

from __future__ import annotations

import numpy as np

from dist_train.data.plan.depth_bins import DepthBins
from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.positives import Bands
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints


def longest_run(positives: ByDepth, negatives: ByDepth, rules: PlanRules) -> int:
    """The most blocks that a step may have: what the budget has room for among the shallowest
    clips, and of which the negatives can all be different."""
    shallowest = min(depths[0] for depths in (positives.depths, negatives.depths) if len(depths))
    assert rules.max_voxels is not None
    room = rules.max_voxels // (rules.batch * int(shallowest) * rules.frame_voxels)
    block = rules.batch // rules.ratio.group * rules.ratio.negatives
    return max(1, min(room, (len(negatives) // 2 + 1) // block))


def run_edges(
    blocks: int, longest: int, bands: Bands, negatives: ByDepth, bins: DepthBins, rules: PlanRules
) -> Ints:
    """Edges of the runs of a pass of ``blocks`` whole blocks: int64 [runs + 1].

    They must not depend on the epoch, or no formula would tell the first step of one. So each block
    is taken to be as deep as it can be in any epoch: its clips as far up as their window reaches,
    and the last bin that its slots can come to.
    """
    epochs = bands.epochs
    number = np.arange(1, blocks + 1)
    before = np.where(number > bands.split, epochs.count - blocks * epochs.take, 0)
    last = np.minimum(number * epochs.take + before + bands.window - 2, epochs.count - 1)
    slots = rules.ratio.negatives_of(number * epochs.take + before)
    first_slots = bins.shares.ends // bins.shares.cycle
    bin_ = np.searchsorted(first_slots[:-1], slots, side="right") - 1
    deepest = np.maximum(bands.clips.depth_at(last), negatives.depth_at(bins.starts[bin_ + 1] - 1))
    assert rules.max_voxels is not None
    room = rules.max_voxels // (rules.batch * rules.frame_voxels * deepest)
    edges = [0]
    for block, most in enumerate(np.minimum(room, longest).tolist()):
        # The tail and the head stand between two runs.
        if block > edges[-1] and (block + 1 - edges[-1] > most or block == bands.split):
            edges.append(block)
    return np.array([*edges, blocks])
