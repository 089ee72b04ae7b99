"""Steps sized by a voxel budget: runs of neighbouring blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_train.data.plan.anchor import AnchorOrder
from dist_train.data.plan.depth_bins import DepthBins
from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints


def longest_run(classes: Sequence[ByDepth], rules: PlanRules) -> int:
    """The most blocks of a step, by the budget and by the clips, which must all differ.

    Args:
        classes: the anchor, then the other classes.
    """
    shallowest = min(int(clips.depths[0]) for clips in classes if len(clips))
    different = [
        (len(clips) // 2 + 1) // rules.clips_of(number)
        for number, clips in enumerate(classes)
        if number
    ]
    return max(1, min([_frames(rules) // shallowest, *different]))


def run_edges(
    blocks: int,
    longest: int,
    order: AnchorOrder,
    others: Sequence[tuple[ByDepth, DepthBins]],
    rules: PlanRules,
) -> Ints:
    """Edges of the runs, of at most ``longest`` blocks, in a pass of ``blocks`` whole blocks: int64
    [runs + 1].

    The edges must not depend on the epoch, so that the first step of an epoch has a formula.
    Therefore each block counts with the greatest depth that it can have in any epoch: clips of the
    anchor shifted up by a whole window, and the deepest bin of each other class that its clips can
    come from.
    """
    epochs = order.epochs
    number = np.arange(1, blocks + 1)
    before = np.where(number > order.split, epochs.count - blocks * epochs.per_block, 0)
    ends = number * epochs.per_block + before
    last = np.minimum(ends + order.window - 2, epochs.count - 1)
    deepest = order.clips.depth_at(last)
    for other, (clips, bins) in enumerate(others, 1):
        first_slots = bins.quotas.ends // bins.quotas.cycle
        slots = rules.ratio.of(other, ends)
        bin_ends = bins.starts[np.searchsorted(first_slots[:-1], slots, side="right")]
        deepest = np.maximum(deepest, clips.depth_at(bin_ends - 1))
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
