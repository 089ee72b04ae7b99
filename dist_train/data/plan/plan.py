"""The order of training: (seed, step) -> the global batch -> each rank's slots, in closed form.

Pure numpy, no I/O.

- A block has ``batch`` clips, exactly p positives to q negatives. A step is a block, or a run of
  blocks under a voxel budget.
- An epoch sorts the positives by depth, cuts them into blocks (positives.py) and shuffles the
  blocks.
- The negatives are sorted into bins of similar depth (depth_bins.py). Each bin is an endless
  stream (negatives.py).
- A block takes negatives from the bins of its own rank in depth (bin_slices.py).

Any step can be computed without the steps before it: a formula gives the number of negatives that
earlier epochs took from each bin (depth_bins.py). docs/sampling.md follows a step by hand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.bin_slices import BinSlices, epoch_slices
from dist_train.data.plan.depth_bins import Demand, DepthBins, depth_bins
from dist_train.data.plan.depth_order import ByDepth, by_depth, depth_order
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.negatives import NegativeStreams
from dist_train.data.plan.positives import PositiveOrder
from dist_train.data.plan.rules import Matching, PlanRules, check_rules
from dist_train.data.plan.shuffle import Ints, below, permute, root_key, subkey
from dist_train.data.plan.voxel_budget import longest_run, run_edges
from dist_train.data.plan.weights import UNIT, Floats, arcs, as_integers, balanced, check_weights
from dist_train.errors import PlanError

#: Part of the fingerprint. Raise it with every change of the order that a seed gives.
VERSION = 2


@dataclass(frozen=True, eq=False)
class Plan:
    """The global batches of a run, of exactly ``ratio`` = p:q positives to negatives.

    An epoch is one pass over the positives. Epoch e begins at the first step that begins with a
    clip of pass e. If a pass does not fill its last step, the next pass completes it, so epochs can
    differ in length.

    A global batch is a sequence of groups of p positives and q negatives. Ranks and micro-batches
    are cut between groups, so each has the exact ratio. The concatenation over ranks is the global
    batch at every world size.
    """

    rules: PlanRules
    order: PositiveOrder
    bins: DepthBins
    streams: NegativeStreams
    negatives: ByDepth
    weights_digest: str = ""

    @property
    def batch(self) -> int:
        """Clips of a block. Without a voxel budget a step is one block."""
        return self.rules.batch

    @property
    def ratio(self) -> ClassRatio:
        return self.rules.ratio

    @property
    def positives(self) -> ByDepth:
        return self.order.clips

    @property
    def epochs(self) -> Epochs:
        return self.order.epochs

    def first_step(self, epoch: int) -> int:
        """The first step of epoch ``epoch``."""
        return self.epochs.first_step(epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch that step ``step`` belongs to: the last e with first_step(e) <= step."""
        return self.epochs.epoch_of(step)

    def clips_at(self, step: int) -> int:
        """Clips of the step's global batch, a multiple of ``batch``."""
        blocks = self._blocks_at(step)
        return (blocks.last - blocks.first) * self.batch

    def weight(self, step: int) -> float:
        """The factor of the step's mean loss that makes all clips of a run count alike.

        It is the step's number of clips over the mean of an endless run; 1 without a voxel budget.
        """
        blocks = self._blocks_at(step)
        return (blocks.last - blocks.first) / self.epochs.blocks_a_step()

    def global_batch(self, step: int) -> Ints:
        """Clip numbers of step ``step``, counted from 0: int64 [clips_at(step)]."""
        return self._clips(*self._groups(step)).reshape(-1)

    def depths(self, step: int) -> Ints:
        """Depths, in frames, of the clips of ``global_batch``: int64 [clips_at(step)]."""
        positives, negatives = self._groups(step)
        return np.concatenate(
            [self.positives.depth_at(positives), self.negatives.depth_at(negatives)], axis=1
        ).reshape(-1)

    def rank_batches(self, step: int, *, rank: int, world: int, accumulate: int) -> Ints:
        """Clip numbers of one rank: int64 [accumulate, clips_at(step) / world / accumulate].

        The batch is cut into micro-batches first, then into ranks. So the ranks together see the
        same clips in a micro-batch at every world size, as shared batch statistics require.

        Raises:
            PlanError: the global batch cannot be cut that way into whole groups.
        """
        self.check_cut(world, accumulate)
        # Look up this rank's clip numbers only, as they may be in a mapped file.
        own = (
            indices.reshape(accumulate, world, -1, indices.shape[1])[:, rank].reshape(
                -1, indices.shape[1]
            )
            for indices in self._groups(step)
        )
        return self._clips(*own).reshape(accumulate, -1)

    def check_cut(self, world: int, accumulate: int) -> None:
        """Raise ``PlanError`` unless each micro-batch of each rank can hold whole groups."""
        group = self.ratio.group
        if self.batch % (world * accumulate * group):
            raise PlanError(
                f"plan.batch {self.batch} cannot be cut into {world} processes x {accumulate} "
                f"accumulation steps with {self.ratio.positives} positive to "
                f"{self.ratio.negatives} negatives in each",
                fix=f"Use a multiple of {world * accumulate * group}.",
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the order depends on, as 16 hex digits."""
        parts = (
            VERSION,
            self.rules,
            self.positives.digest,
            self.negatives.digest,
            self.weights_digest,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _clips(self, positives: Ints, negatives: Ints) -> Ints:
        """Clip numbers of groups of indices [groups, p] and [groups, q]: int64 [groups, p + q]."""
        return np.concatenate(
            [self.positives.clips[positives], self.negatives.clips[negatives]], axis=1
        ).astype(np.int64)

    def _blocks_at(self, step: int) -> StepBlocks:
        epoch = self.epochs.epoch_of(step)
        visit = step - self.epochs.first_step(epoch)
        if visit == self.epochs.runs_of(epoch):
            return StepBlocks(epoch, -1, 0, 1)
        first, last = self.epochs.blocks_of(epoch, int(_visits(self, epoch)[visit]))
        return StepBlocks(epoch, visit + 1, first, last)

    def _groups(self, step: int) -> tuple[Ints, Ints]:
        """Indices of the step's clips in groups: int64 [groups, p] and [groups, q].

        The groups form a ring: every second one ascends in depth, the others descend. The ring
        starts at a random group. So every micro-batch holds clips of similar depth, however the
        batch is cut, and no rank always gets the shallow clips.
        """
        epoch, piece, *blocks = self._blocks_at(step)
        if piece < 0:
            positives = np.concatenate([self.order.tail(epoch), self.order.head(epoch + 1)])
            both = zip(_slices(self, epoch).of(-1), _slices(self, epoch + 1).of(0), strict=True)
            bins, positions, counts = (np.concatenate(arrays) for arrays in both)
            # In a bin's stream the head of the next epoch follows the tail of this one, so the two
            # slices of a bin join to one.
            distinct, first = np.unique(bins, return_index=True)
            totals = np.bincount(bins, counts)[distinct].astype(np.int64)
            negatives = self.streams.take(distinct, positions[first], totals)
        else:
            positives = self.order.blocks(epoch, *blocks)
            negatives = self.streams.take(*_slices(self, epoch).of(piece))

        groups = len(positives) // self.ratio.positives
        turn = below(subkey(root_key(self.rules.seed, "turns"), step), groups)
        ascending = np.arange(groups)
        ring = np.roll(np.concatenate([ascending[::2], ascending[1::2][::-1]]), turn)
        return (
            _by_depth(positives, self.positives).reshape(groups, -1)[ring],
            _by_depth(negatives, self.negatives).reshape(groups, -1)[ring],
        )


class StepBlocks(NamedTuple):
    """The blocks of a step.

    Attributes:
        epoch: the epoch of the step.
        piece: its piece in ``BinSlices``; -1 if the step spans the end of the pass.
        first, last: its blocks, counted from the shallow end; ``last`` is excluded.
    """

    epoch: int
    piece: int
    first: int
    last: int


# A step needs two epochs at most; the rest serves a second reader, such as another loader.
@lru_cache(maxsize=8)
def _visits(plan: Plan, epoch: int) -> Ints:
    """The runs of an epoch (numbered from the shallow end) in the order of training: int64
    [runs]."""
    runs = plan.epochs.runs_of(epoch)
    return permute(np.arange(runs), runs, subkey(root_key(plan.rules.seed, "visits"), epoch))


@lru_cache(maxsize=8)
def _slices(plan: Plan, epoch: int) -> BinSlices:
    visits = _visits(plan, epoch)
    split = int(np.searchsorted(plan.epochs.edges(epoch), plan.order.split))
    return epoch_slices(epoch, plan.epochs, plan.bins.quotas, visits, split, plan.ratio)


def _by_depth(indices: Ints, clips: ByDepth) -> Ints:
    """Indices in order of depth. Clips of equal depth keep their order."""
    return indices[np.argsort(clips.depth_at(indices), kind="stable")]


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
    """A plan over the clip numbers of the two classes.

    Args:
        positives: clip numbers, int64 [count], in any order.
        negatives: clip numbers, int64 [count], in any order.
        positive_depths: frames of each positive, int64 [count]. None: all clips count as equally
            deep, so their order is random.
        negative_depths: frames of each negative, int64 [count].
        weights: float64 [count], the relative frequency of each negative within its depth bin; 0
            leaves the clip out.
        groups: group code of each negative, int64 [count]. Weights are divided by the size of the
            group, so that all groups are equally frequent.
        batch, ratio, seed, matching, max_voxels, frame_voxels: see ``PlanRules``.

    Raises:
        PlanError: the batch is no multiple of p + q; a class has too few clips for a batch without
            repetition; a clip is in both classes; or the shapes or values of numbers, depths,
            weights or groups are wrong.
    """
    rules = PlanRules(batch, ClassRatio(*ratio), seed, matching, max_voxels, frame_voxels)
    check_rules(rules, len(positives))
    both = np.intersect1d(positives, negatives)
    if len(both):
        raise PlanError(f"clip {both[0]} is in both classes ({len(both)} such clips)")
    if weights is not None:
        check_weights(weights, len(negatives))
    if groups is not None:
        weights = balanced(np.ones(len(negatives)) if weights is None else weights, groups)
    if weights is not None:
        kept = weights > 0
        negatives, weights = negatives[kept], weights[kept]
        negative_depths = None if negative_depths is None else negative_depths[kept]
    sorted_positives = by_depth(positives, positive_depths, "positives")
    sorted_negatives = by_depth(negatives, negative_depths, "negatives")
    if weights is not None:
        depths = np.ones_like(negatives) if negative_depths is None else negative_depths
        weights = weights[depth_order(negatives, depths)]
    return plan_of(sorted_positives, sorted_negatives, rules, weights)


def plan_of(
    positives: ByDepth, negatives: ByDepth, rules: PlanRules, weights: Floats | None = None
) -> Plan:
    """A plan over clips that are sorted already.

    Args:
        weights: float64 [count], all greater than 0, by index of the negative.

    Raises:
        PlanError: see ``make_plan``.
    """
    check_rules(rules, len(positives))
    if weights is not None:
        check_weights(weights, len(negatives))
        if len(weights) and weights.min() == 0:
            raise PlanError("a weight of a negative is 0", fix="Leave the clip out.")
    per_block = rules.batch // rules.ratio.group * rules.ratio.positives
    epochs, block = Epochs(len(positives), per_block), rules.ratio.negatives_of(per_block)
    longest = 1 if rules.max_voxels is None else longest_run(positives, negatives, rules)
    demand = Demand(rules.ratio, block, longest * block, straddling=epochs.period > 1)
    natural = None
    if rules.matching == "natural":
        natural = np.diff(negatives.starts)
        if weights is not None and len(weights):
            natural = np.add.reduceat(as_integers(weights), negatives.starts[:-1])
    bins = depth_bins(positives, negatives, demand, natural)

    ends = None
    if weights is not None:
        # A pass of the least possible length would repeat the same few clips.
        needed = np.minimum(np.diff(bins.starts), np.maximum(1, 3 * (bins.most - 1)))
        ends = arcs(weights, bins.starts, needed)
    spacing = 1 if ends is None else UNIT
    streams = NegativeStreams(bins.starts, bins.most, rules.seed, ends, spacing)
    order = PositiveOrder(positives, epochs, rules.seed)
    if rules.max_voxels is not None:
        counts = set(epochs.whole_block_counts)
        runs = {n: run_edges(n, longest, order, negatives, bins, rules) for n in counts}
        order = replace(order, epochs=replace(epochs, runs=runs))
    digest = "" if weights is None else hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()
    return Plan(rules, order, bins, streams, negatives, digest)
