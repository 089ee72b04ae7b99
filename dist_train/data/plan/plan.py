"""The order of training: (seed, step) -> the global batch -> each rank's slots, in closed form.

Pure numpy, no I/O.

- A block has ``batch`` clips, exactly p positives to q negatives. A step is a block, or a run of
  blocks under a voxel budget.
- An epoch sorts the positives by depth, cuts them into blocks (positives.py) and shuffles those.
- The negatives are sorted into bins of similar depth (depth_bins.py), which are endless streams
  (negatives.py). A block takes negatives of its own rank in depth (bin_slices.py).

No step needs the steps before it: a formula gives the number of negatives that earlier epochs took
from each bin. docs/sampling.md follows a step by hand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.bin_slices import BinSlice, epoch_slices
from dist_train.data.plan.depth_bins import DepthBins, depth_bins
from dist_train.data.plan.depth_order import ByDepth, by_depth
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.negatives import NegativeStreams
from dist_train.data.plan.positives import PositiveOrder
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints, permute, root_key, subkey
from dist_train.data.plan.voxel_budget import longest_run, run_edges
from dist_train.data.plan.weights import UNIT, Floats, arcs
from dist_train.errors import PlanError

#: Part of the fingerprint. Raise it with every change of the order that a seed gives.
VERSION = 2


@dataclass(frozen=True, eq=False)
class Plan:
    """The global batches of a run, of exactly ``ratio`` = p:q positives to negatives.

    An epoch is one pass over the positives. If a pass does not fill its last step, the next pass
    completes it, so epochs can differ in length.

    A global batch is a sequence of groups of p positives and q negatives. Ranks and micro-batches
    are cut between groups, so each has the exact ratio.
    """

    rules: PlanRules
    order: PositiveOrder
    bins: DepthBins
    streams: NegativeStreams
    negatives: ByDepth

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
        """The first step of an epoch."""
        return self.epochs.first_step(epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step: the last e with first_step(e) <= step."""
        return self.epochs.epoch_of(step)

    def clips_at(self, step: int) -> int:
        """Clips of the step's global batch, a multiple of ``batch``."""
        *_, first, last = self._blocks_at(step)
        return (last - first) * self.batch

    def weight(self, step: int) -> float:
        """The factor of the step's mean loss that makes all clips of a run count alike: the step's
        number of clips over the mean of an endless run."""
        return self.clips_at(step) / self.batch / self.epochs.blocks_a_step()

    def global_batch(self, step: int) -> Ints:
        """Clip numbers of step ``step``, counted from 0: int64 [clips_at(step)]."""
        return self._clips(*self._groups(step)).reshape(-1)

    def depths(self, step: int) -> Ints:
        """Depths, in frames, of the clips of ``global_batch``: int64 [clips_at(step)]."""
        positives, negatives = self._groups(step)
        depths = self.positives.depth_at(positives), self.negatives.depth_at(negatives)
        return np.concatenate(depths, axis=1).reshape(-1)

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
            groups.reshape(accumulate, world, -1, groups.shape[1])[:, rank].reshape(
                -1, groups.shape[1]
            )
            for groups in self._groups(step)
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
        weights = self.negatives.weights
        weighted = b"" if weights is None else weights.astype("<f8").tobytes()
        digest = "" if weights is None else hashlib.sha256(weighted).hexdigest()
        parts = VERSION, self.rules, self.positives.digest, self.negatives.digest, digest
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _clips(self, positives: Ints, negatives: Ints) -> Ints:
        """Clip numbers of groups of indices [groups, p] and [groups, q]: int64 [groups, p + q]."""
        return np.concatenate(
            [self.positives.clips[positives], self.negatives.clips[negatives]], axis=1
        ).astype(np.int64)

    def _blocks_at(self, step: int) -> tuple[int, int, int, int]:
        """(epoch, piece, first, last): the blocks of a step, ``last`` excluded, counted from the
        shallow end. Piece -1 is the step that spans the end of the pass."""
        epoch = self.epoch_of(step)
        visit, (visits, _) = step - self.first_step(epoch), _epoch(self, epoch)
        if visit == len(visits):
            return epoch, -1, 0, 1
        first, last = self.epochs.edges(epoch)[visits[visit] :][:2].tolist()
        return epoch, visit + 1, first, last

    def _groups(self, step: int) -> tuple[Ints, Ints]:
        """Indices of the step's clips in groups: int64 [groups, p] and [groups, q].

        The groups form a ring: every second one ascends in depth, the others descend. The ring
        starts at a random group. So a micro-batch holds clips of similar depth, however the batch
        is cut, and no rank always gets the shallow clips.
        """
        epoch, piece, first, last = self._blocks_at(step)
        if piece < 0:
            positives = np.concatenate([self.order.tail(epoch), self.order.head(epoch + 1)])
            parts = zip(_epoch(self, epoch)[1][-1], _epoch(self, epoch + 1)[1][0], strict=True)
            bins, positions, counts = (np.concatenate(arrays) for arrays in parts)
            # In a bin's stream the head of the next epoch follows the tail of this one, so the two
            # slices of a bin join to one.
            distinct, places = np.unique(bins, return_index=True)
            totals = np.bincount(bins, counts)[distinct].astype(np.int64)
            negatives = self.streams.take(distinct, positions[places], totals)
        else:
            positives = self.order.blocks(epoch, first, last)
            negatives = self.streams.take(*_epoch(self, epoch)[1][piece])

        groups = len(positives) // self.ratio.positives
        turn = int(subkey(root_key(self.rules.seed, "turns"), step)[0]) % groups
        ascending = np.arange(groups)
        ring = np.roll(np.concatenate([ascending[::2], ascending[1::2][::-1]]), turn)
        return (
            _by_depth(positives, self.positives).reshape(groups, -1)[ring],
            _by_depth(negatives, self.negatives).reshape(groups, -1)[ring],
        )


# A step needs two epochs at most; the rest serves a second reader, such as another loader.
@lru_cache(maxsize=8)
def _epoch(plan: Plan, epoch: int) -> tuple[Ints, list[BinSlice]]:
    """The runs of an epoch (numbered from the shallow end) in the order of training, int64 [runs],
    and the negatives of its pieces."""
    edges = plan.epochs.edges(epoch)
    runs = len(edges) - 1
    visits = permute(np.arange(runs), runs, subkey(root_key(plan.rules.seed, "visits"), epoch))
    split = int(np.searchsorted(edges, plan.order.split))
    return visits, epoch_slices(epoch, plan.epochs, plan.bins.quotas, visits, split, plan.ratio)


def _by_depth(indices: Ints, clips: ByDepth) -> Ints:
    """Indices in order of depth. Clips of equal depth keep their order."""
    return indices[np.argsort(clips.depth_at(indices), kind="stable")]


def sorted_classes(
    positives: Ints,
    negatives: Ints,
    *,
    positive_depths: Ints | None = None,
    negative_depths: Ints | None = None,
    weights: Floats | None = None,
    groups: Ints | None = None,
) -> tuple[ByDepth, ByDepth]:
    """Positives and negatives, sorted by depth.

    Args:
        positives, negatives: their clip numbers, int64 [count] each, in any order.
        positive_depths: frames of each positive, int64 [count]. None: all clips count as equally
            deep, so their order is random.
        negative_depths: frames of each negative, int64 [count].
        weights: float64 [count], the relative frequency of each negative within its depth bin; 0
            leaves the clip out.
        groups: group code of each negative, int64 [count]. Weights are divided by the size of the
            group, so that all groups are equally frequent.
    """
    if groups is not None:
        _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        weights = (1.0 if weights is None else weights) / sizes[group]
    if weights is not None:
        kept = weights > 0
        negatives, weights = negatives[kept], weights[kept]
        negative_depths = None if negative_depths is None else negative_depths[kept]
    sorted_negatives = by_depth(negatives, negative_depths, weights)
    return by_depth(positives, positive_depths), sorted_negatives


def plan_of(positives: ByDepth, negatives: ByDepth, rules: PlanRules) -> Plan:
    """A plan over clips that are sorted already.

    Raises:
        PlanError: a class has too few clips for a batch without repetition.
    """
    # A pass must be as long as a block and its longest tail: see positives.py.
    needed = 2 * rules.positives - gcd(len(positives), rules.positives)
    if len(positives) < needed:
        raise PlanError(
            f"the train split has {len(positives)} positives; a batch with {rules.positives} "
            f"different positives needs at least {needed}",
            fix="Lower plan.batch, or select more clips.",
        )
    epochs = Epochs(len(positives), rules.positives)
    longest = 1 if rules.max_voxels is None else longest_run(positives, negatives, rules)
    bins = depth_bins(positives, negatives, rules, longest, straddling=epochs.period > 1)
    ends, spacing = None, 1
    if negatives.weights is not None:
        # A pass of the least possible length would repeat the same few clips.
        least = np.minimum(np.diff(bins.starts), np.maximum(1, 3 * (bins.most - 1)))
        ends, spacing = arcs(negatives.weights, bins.starts, least), UNIT
    order = PositiveOrder(positives, epochs, rules.seed)
    if rules.max_voxels is not None:
        counts = set(epochs.whole_block_counts)
        runs = {n: run_edges(n, longest, order, negatives, bins, rules) for n in counts}
        order = replace(order, epochs=replace(epochs, runs=runs))
    streams = NegativeStreams(bins.starts, bins.most, rules.seed, ends, spacing)
    return Plan(rules, order, bins, streams, negatives)
