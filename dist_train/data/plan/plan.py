"""The order of training: (seed, step) -> the global batch -> each rank's slots, in closed form.

Pure numpy; no I/O. A block is a step's clips at the plain batch size, of exactly p positives to q
negatives. An epoch puts the positives in order of depth and cuts them into blocks (positives.py),
which follow each other in a shuffled order. The negatives stand in bins of like depth
(depth_bins.py), each an endless stream of passes (negatives.py). A block takes its negatives from
the bins that its rank in depth points to. Any step is known without the steps before it: what its
epoch asks of each bin is one small table, and what the epochs before it drew is a formula
(depth_bins.py).

docs/sampling.md shows how to follow it by hand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from dist_train.data.plan.depth_bins import Demand, DepthBins, depth_bins
from dist_train.data.plan.depth_order import ByDepth, by_depth, depth_order
from dist_train.data.plan.draws import Draws, epoch_draws
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.negatives import Passes
from dist_train.data.plan.positives import Bands
from dist_train.data.plan.rules import Matching, PlanRules, check_rules
from dist_train.data.plan.shuffle import Ints, below, permute, root_key, subkey
from dist_train.data.plan.voxel_budget import longest_run, run_edges
from dist_train.data.plan.weights import UNIT, Floats, arcs, balanced, check_weights, whole
from dist_train.errors import PlanError

#: Part of the fingerprint. A change of the order that a seed gives needs another number.
VERSION = 2


@dataclass(frozen=True, eq=False)
class Plan:
    """The global batches of a run, of exactly ``ratio`` = (p, q) positives to negatives.

    An epoch is one pass over the positives: epoch e begins at the first step that begins with a
    clip of pass e. Where a pass does not fill its last step, the next pass does, so epochs can
    differ in length.

    A global batch is a row of groups of p positives and q negatives. Ranks and micro-batches are
    cut along groups, so each of them has the exact ratio, and the concatenation over ranks is the
    global batch at every world size.
    """

    rules: PlanRules
    bands: Bands
    bins: DepthBins
    passes: Passes
    negatives: ByDepth
    weights_digest: str = ""

    @property
    def batch(self) -> int:
        """Clips of a block, which is a step if there is no voxel budget."""
        return self.rules.batch

    @property
    def ratio(self) -> tuple[int, int]:
        return self.rules.ratio

    @property
    def positives(self) -> ByDepth:
        return self.bands.clips

    @property
    def epochs(self) -> Epochs:
        return self.bands.epochs

    def first_step(self, epoch: int) -> int:
        """The first step of epoch ``epoch``."""
        return self.epochs.first_step(epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch that step ``step`` belongs to: the last e with first_step(e) <= step."""
        return self.epochs.epoch_of(step)

    def clips_at(self, step: int) -> int:
        """Clips of the global batch: a multiple of ``batch``."""
        place = self._place(step)
        return (place.last - place.first) * self.batch

    def weight(self, step: int) -> float:
        """What the step's mean loss is multiplied by so that every clip of a run counts alike: its
        clips over the mean of an endless run. 1 without a voxel budget."""
        place = self._place(step)
        return (place.last - place.first) / self.epochs.blocks_a_step()

    def global_batch(self, step: int) -> Ints:
        """Clip numbers of step ``step`` (0 is the first of the run): int64 [clips_at(step)]."""
        return self._clips(*self._groups(step)).reshape(-1)

    def depths(self, step: int) -> Ints:
        """Frames of the clips of ``global_batch``, in its order: int64 [clips_at(step)]."""
        positives, negatives = self._groups(step)
        return np.concatenate(
            [self.positives.depth_at(positives), self.negatives.depth_at(negatives)], axis=1
        ).reshape(-1)

    def rank_batches(self, step: int, *, rank: int, world: int, accumulate: int) -> Ints:
        """What ``rank`` sees at a step: int64 [accumulate, clips_at(step) / world / accumulate].

        First come the micro-batches, then the ranks: all ranks together see the same clips in a
        micro-batch at every world size, which statistics that they share depend on.

        Raises:
            PlanError: the global batch cannot be cut that way in whole groups.
        """
        self.check_cut(world, accumulate)
        # Only of this rank's clips is the number looked up, in what may be a mapped file.
        mine = (
            indices.reshape(accumulate, world, -1, indices.shape[1])[:, rank].reshape(
                -1, indices.shape[1]
            )
            for indices in self._groups(step)
        )
        return self._clips(*mine).reshape(accumulate, -1)

    def check_cut(self, world: int, accumulate: int) -> None:
        """Raise ``PlanError`` unless every rank's every micro-batch can hold whole groups."""
        group = sum(self.ratio)
        if self.batch % (world * accumulate * group):
            raise PlanError(
                f"plan.batch {self.batch} cannot be cut into {world} processes x {accumulate} "
                f"accumulation steps with {self.ratio[0]} positive to {self.ratio[1]} negatives "
                f"in each",
                fix=f"Use a multiple of {world * accumulate * group}.",
            )

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the whole order, as 16 hex digits."""
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

    def _place(self, step: int) -> Place:
        epoch = self.epochs.epoch_of(step)
        place = step - self.epochs.first_step(epoch)
        if place == self.epochs.runs_of(epoch):
            return Place(epoch, -1, 0, 1)
        first, last = self.epochs.blocks_of(epoch, int(_visits(self, epoch)[place]))
        return Place(epoch, place + 1, first, last)

    def _groups(self, step: int) -> tuple[Ints, Ints]:
        """Indices of the step's clips in groups: int64 [groups, p] and [groups, q].

        The groups stand on a ring, up in depth by every second one and down again by the others,
        and the ring is cut at a random place. So a micro-batch holds clips of like depth however
        the batch is cut, and no rank is always given the shallow ones.
        """
        place = self._place(step)
        if place.piece < 0:
            positives = np.concatenate(
                [self.bands.tail(place.epoch), self.bands.head(place.epoch + 1)]
            )
            drawn = zip(
                _draws(self, place.epoch).of(-1), _draws(self, place.epoch + 1).of(0), strict=True
            )
            draws = [np.concatenate(both) for both in drawn]
            # A bin's last place in the one epoch is followed by its first in the next.
            bins, first = np.unique(draws[0], return_index=True)
            draws = [bins, draws[1][first], np.bincount(draws[0], draws[2])[bins].astype(np.int64)]
        else:
            positives = self.bands.blocks(place.epoch, place.first, place.last)
            draws = list(_draws(self, place.epoch).of(place.piece))
        negatives = self.passes.take(*draws)

        groups = len(positives) // self.ratio[0]
        turn = below(subkey(root_key(self.rules.seed, "turns"), step), groups)
        upward = np.arange(groups)
        ring = np.roll(np.concatenate([upward[::2], upward[1::2][::-1]]), turn)
        return (
            _by_depth(positives, self.positives).reshape(groups, -1)[ring],
            _by_depth(negatives, self.negatives).reshape(groups, -1)[ring],
        )


class Place(NamedTuple):
    """Where a step lies: the piece of its epoch's draws, -1 if it reaches over the end of the pass,
    and its blocks ``first`` to ``last`` (excluded), counted from the shallow end."""

    epoch: int
    piece: int
    first: int
    last: int


# A step needs two epochs at most; the others are for a second walk, as of another loader.
@lru_cache(maxsize=8)
def _visits(plan: Plan, epoch: int) -> Ints:
    """The runs of an epoch, counted from the shallow end, as they are visited: int64 [runs]."""
    runs = plan.epochs.runs_of(epoch)
    return permute(np.arange(runs), runs, subkey(root_key(plan.rules.seed, "visits"), epoch))


@lru_cache(maxsize=8)
def _draws(plan: Plan, epoch: int) -> Draws:
    visits = _visits(plan, epoch)
    split = int(np.searchsorted(plan.epochs.edges(epoch), plan.bands.split))
    return epoch_draws(epoch, plan.epochs, plan.bins.shares, visits, split, plan.ratio)


def _by_depth(indices: Ints, clips: ByDepth) -> Ints:
    """Indices in order of depth; clips of one depth stay as they were drawn."""
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
    """A plan over clip numbers of the two classes.

    Args:
        positives: clip numbers, int64 [count], in any order.
        negatives: clip numbers of the other class, likewise.
        positive_depths: frames of each positive, int64 [count]. Without depths all clips are taken
            to be alike, and so come in random order.
        negative_depths: frames of each negative, int64 [count].
        weights: of each negative, float64 [count]. It is drawn as often, against others of its bin,
            as its weight says; 0 leaves it out.
        groups: code of each negative's group, int64 [count]. Weights are divided by the size of the
            group, so that groups are drawn alike.
        batch, ratio, seed, matching, max_voxels, frame_voxels: see ``PlanRules``.

    Raises:
        PlanError: the batch is no multiple of p + q, a class holds too few clips for a batch of
            different ones, a clip is in both, or numbers, depths, weights or groups do not fit.
    """
    rules = PlanRules(batch, ratio, seed, matching, max_voxels, frame_voxels)
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
    """A plan over clips that are sorted already, as a cache has them.

    Args:
        weights: of each negative, by index, all greater than 0: float64 [count].

    Raises:
        PlanError: see ``make_plan``.
    """
    check_rules(rules, len(positives))
    if weights is not None:
        check_weights(weights, len(negatives))
        if len(weights) and weights.min() == 0:
            raise PlanError("a weight of a negative is 0", fix="Leave the clip out.")
    p, q = rules.ratio
    take, block = rules.batch // (p + q) * p, rules.batch // (p + q) * q
    epochs = Epochs(len(positives), take)
    longest = 1 if rules.max_voxels is None else longest_run(positives, negatives, rules)
    demand = Demand(rules.ratio, block, longest * block, straddling=epochs.period > 1)
    natural = None
    if rules.matching == "natural":
        natural = np.diff(negatives.starts)
        if weights is not None and len(weights):
            natural = np.add.reduceat(whole(weights), negatives.starts[:-1])
    bins = depth_bins(positives, negatives, demand, natural)

    ends = None
    if weights is not None:
        # A pass of as few clips as it can have would come to the same ones again and again.
        needed = np.minimum(np.diff(bins.starts), np.maximum(1, 3 * (bins.most - 1)))
        ends = arcs(weights, bins.starts, needed)
    passes = Passes(bins.starts, bins.most, rules.seed, ends, 1 if ends is None else UNIT)
    bands = Bands(positives, epochs, rules.seed)
    if rules.max_voxels is not None:
        runs = {n: run_edges(n, longest, bands, negatives, bins, rules) for n in set(epochs.wholes)}
        bands = replace(bands, epochs=replace(epochs, runs=runs))
    digest = "" if weights is None else hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()
    return Plan(rules, bands, bins, passes, negatives, digest)
