"""The order of training: (seed, step) -> the global batch -> each rank's slots, in closed form.

Pure numpy, no I/O.

- A block has ``batch`` clips, exactly in the ratio of the classes. A step is a block, or a run of
  blocks under a voxel budget.
- One class is the anchor. An epoch sorts its clips by depth, cuts them into blocks (anchor.py) and
  shuffles those.
- The clips of each other class are sorted into bins of similar depth (depth_bins.py), which are
  endless streams (streams.py). A block takes clips of its own rank in depth (bin_slices.py).

No step needs the steps before it: a formula gives the number of clips that earlier epochs took from
each bin. docs/sampling.md follows a step by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd

import numpy as np

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.anchor import AnchorOrder
from dist_train.data.plan.bin_slices import BinSlice, epoch_slices
from dist_train.data.plan.depth_bins import DepthBins, depth_bins
from dist_train.data.plan.depth_order import ByDepth, too_few_clips
from dist_train.data.plan.epochs import Epochs
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints, permute, root_key, subkey
from dist_train.data.plan.streams import Streams
from dist_train.data.plan.voxel_budget import longest_run, run_edges
from dist_train.data.plan.weights import UNIT, arcs
from dist_train.errors import PlanError

#: Part of the fingerprint. Raise it with every change of the order that a seed gives.
VERSION = 2


@dataclass(frozen=True, eq=False)
class OtherClass:
    """A class other than the anchor: its clips in bins, each of which is an endless stream."""

    clips: ByDepth
    bins: DepthBins
    streams: Streams


@dataclass(frozen=True, eq=False)
class Plan:
    """The global batches of a run, each exactly in the ratio of the classes.

    An epoch is one pass over the anchor. If a pass does not fill its last step, the next pass
    completes it, so epochs can differ in length.

    A global batch is a sequence of groups, each of the anchor's clips and then those of each other
    class. Ranks and micro-batches are cut between groups, so each has the exact ratio.
    """

    rules: PlanRules
    order: AnchorOrder
    others: tuple[OtherClass, ...]

    @property
    def batch(self) -> int:
        """Clips of a block. Without a voxel budget a step is one block."""
        return self.rules.batch

    @property
    def ratio(self) -> ClassRatio:
        return self.rules.ratio

    @property
    def anchor(self) -> ByDepth:
        return self.order.clips

    @property
    def classes(self) -> tuple[ByDepth, ...]:
        """The clips of each class, the anchor first."""
        return self.anchor, *(other.clips for other in self.others)

    @property
    def ratio_text(self) -> str:
        """The ratio in words, such as "1 positives to 3 negatives"."""
        named = zip(self.ratio, self.classes, strict=True)
        return " to ".join(f"{count} {clips.name}" for count, clips in named)

    def group_text(self, group: int) -> str:
        """A group of the ratio in words; of more clips, those that are mixed with each other."""
        is_ratio = group == self.ratio.group
        return self.ratio_text if is_ratio else f"{group} clips that are mixed with each other"

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
        return self._clips(self._groups(step)).reshape(-1)

    def depths(self, step: int) -> Ints:
        """Depths, in frames, of the clips of ``global_batch``: int64 [clips_at(step)]."""
        groups = zip(self.classes, self._groups(step), strict=True)
        return np.concatenate([clips.depth_at(of) for clips, of in groups], axis=1).reshape(-1)

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
        return self._clips(own).reshape(accumulate, -1)

    def check_cut(self, world: int, accumulate: int, group: int | None = None) -> None:
        """Raise ``PlanError`` unless each micro-batch of each rank can hold whole groups.

        Args:
            group: clips that must stay together, a multiple of the ratio's group; None for that.
        """
        group = group or self.ratio.group
        if self.batch % (world * accumulate * group):
            raise PlanError(
                f"plan.batch {self.batch} cannot be cut into {world} processes x {accumulate} "
                f"accumulation steps with {self.group_text(group)} in each",
                fix=f"Use a multiple of {world * accumulate * group}.",
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the order depends on, as 16 hex digits."""
        parts = [VERSION, self.rules, self.anchor.digest]
        for other in self.others:
            weights = other.clips.weights
            weighted = b"" if weights is None else weights.astype("<f8").tobytes()
            digest = "" if weights is None else hashlib.sha256(weighted).hexdigest()
            parts += [other.clips.digest, digest]
        return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:16]

    def _clips(self, groups: Iterable[Ints]) -> Ints:
        """Clip numbers of the groups' indices, [groups, quota] for each class: int64 [groups,
        clips of a group]."""
        named = zip(self.classes, groups, strict=True)
        return np.concatenate([clips.clips[of] for clips, of in named], axis=1).astype(np.int64)

    def _blocks_at(self, step: int) -> tuple[int, int, int, int]:
        """(epoch, piece, first, last): the blocks of a step, ``last`` excluded, counted from the
        shallow end. Piece -1 is the step that spans the end of the pass."""
        epoch = self.epoch_of(step)
        visit, (visits, _) = step - self.first_step(epoch), _epoch(self, epoch)
        if visit == len(visits):
            return epoch, -1, 0, 1
        first, last = self.epochs.edges(epoch)[visits[visit] :][:2].tolist()
        return epoch, visit + 1, first, last

    def _groups(self, step: int) -> list[Ints]:
        """Indices of the step's clips in groups, for each class: int64 [groups, quota].

        The groups form a ring: every second one ascends in depth, the others descend. The ring
        starts at a random group. So a micro-batch holds clips of similar depth, however the batch
        is cut, and no rank always gets the shallow clips.
        """
        epoch, piece, first, last = self._blocks_at(step)
        if piece < 0:
            anchors = np.concatenate([self.order.tail(epoch), self.order.head(epoch + 1)])
            slices = [
                _joined(before[-1], after[0])
                for before, after in zip(
                    *(_epoch(self, e)[1] for e in (epoch, epoch + 1)), strict=True
                )
            ]
        else:
            anchors = self.order.blocks(epoch, first, last)
            slices = [pieces[piece] for pieces in _epoch(self, epoch)[1]]
        taken = [other.streams.take(*of) for other, of in zip(self.others, slices, strict=True)]

        groups = len(anchors) // self.ratio[0]
        turn = int(subkey(root_key(self.rules.seed, "turns"), step)[0]) % groups
        ascending = np.arange(groups)
        ring = np.roll(np.concatenate([ascending[::2], ascending[1::2][::-1]]), turn)
        indices = zip(self.classes, [anchors, *taken], strict=True)
        return [_by_depth(of, clips).reshape(groups, -1)[ring] for clips, of in indices]


def _joined(tail: BinSlice, head: BinSlice) -> BinSlice:
    """The slice of a block that spans the end of a pass. In a bin's stream the head of the next
    epoch follows the tail of this one, so the two slices of a bin join to one."""
    bins, positions, counts = (np.concatenate(arrays) for arrays in zip(tail, head, strict=True))
    distinct, places = np.unique(bins, return_index=True)
    totals = np.bincount(bins, counts)[distinct].astype(np.int64)
    return distinct, positions[places], totals


# A step needs two epochs at most; the rest serves a second reader, such as another loader.
@lru_cache(maxsize=8)
def _epoch(plan: Plan, epoch: int) -> tuple[Ints, list[list[BinSlice]]]:
    """The runs of an epoch (numbered from the shallow end) in the order of training, int64 [runs],
    and the slices of its pieces for each class but the anchor."""
    edges = plan.epochs.edges(epoch)
    runs = len(edges) - 1
    visits = permute(np.arange(runs), runs, subkey(root_key(plan.rules.seed, "visits"), epoch))
    split = int(np.searchsorted(edges, plan.order.split))
    return visits, [
        epoch_slices(epoch, plan.epochs, other.bins.quotas, visits, split, plan.ratio, number)
        for number, other in enumerate(plan.others, 1)
    ]


def _by_depth(indices: Ints, clips: ByDepth) -> Ints:
    """Indices in order of depth. Clips of equal depth keep their order."""
    return indices[np.argsort(clips.depth_at(indices), kind="stable")]


def plan_of(anchor: ByDepth, others: Sequence[ByDepth], rules: PlanRules) -> Plan:
    """A plan over the sorted clips of any number of classes, in the order of ``rules.ratio``.

    Raises:
        PlanError: the batch is not a multiple of the ratio's group, or a class has too few clips
            for a batch without repetition.
    """
    if rules.batch % rules.ratio.group:
        named = zip(rules.ratio, (anchor, *others), strict=True)
        parts = " + ".join(f"{count} {clips.name}" for count, clips in named)
        raise PlanError(
            f"plan.batch {rules.batch} is not a multiple of {parts} = {rules.ratio.group}",
            fix=f"Use a multiple of {rules.ratio.group}.",
        )
    # A pass must be as long as a block and its longest tail: see anchor.py.
    per_block = rules.clips_of(0)
    needed = 2 * per_block - gcd(len(anchor), per_block)
    if len(anchor) < needed:
        raise too_few_clips(anchor, per_block, needed)
    epochs = Epochs(len(anchor), per_block)
    longest = 1 if rules.max_voxels is None else longest_run((anchor, *others), rules)
    bins = [
        depth_bins(anchor, clips, rules, number, longest, straddling=epochs.period > 1)
        for number, clips in enumerate(others, 1)
    ]
    order = AnchorOrder(anchor, epochs, rules.seed)
    if rules.max_voxels is not None:
        counts, by_bin = set(epochs.whole_block_counts), list(zip(others, bins, strict=True))
        runs = {n: run_edges(n, longest, order, by_bin, rules) for n in counts}
        order = replace(order, epochs=replace(epochs, runs=runs))
    made = zip(others, bins, range(len(others)), strict=True)
    return Plan(rules, order, tuple(_other_class(*each, rules.seed) for each in made))


def _other_class(clips: ByDepth, bins: DepthBins, number: int, seed: int) -> OtherClass:
    ends, spacing = None, 1
    if clips.weights is not None:
        # A pass of the least possible length would repeat the same few clips.
        least = np.minimum(np.diff(bins.starts), np.maximum(1, 3 * (bins.most - 1)))
        ends, spacing = arcs(clips.weights, bins.starts, least), UNIT
    # The first name dates from plans of two classes; names of keys are part of the order.
    key = root_key(seed, f"negatives/{number}" if number else "negatives")
    return OtherClass(clips, bins, Streams(bins.starts, bins.most, key, ends, spacing))
