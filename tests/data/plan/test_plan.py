"""Guarantees of the order of training, for any seed, size, ratio, depths, weights and cut."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_order import by_depth
from dist_train.data.plan.plan import Plan, make_plan, plan_of
from dist_train.data.plan.rules import Matching, PlanRules
from dist_train.errors import PlanError

GOLDEN_FIRST = [38, 116, 150, 62, 26, 136, 162, 217, 6, 144, 69, 143, 13, 82, 227, 206]
GOLDEN_DIGESTS = ["7468ed1af661d63f", "51499505712f6cbe"]
GOLDEN_FINGERPRINTS = ["a55f8bed8f51ef67", "eef2ae6fba09ca16"]


@dataclass(frozen=True)
class Case:
    """A plan of one to five classes, its settings, and a cut into ranks.

    The clips of class c are numbered c, c + 5, c + 10 and so on. Each class has the arguments of
    ``by_depth``; the first is the anchor.
    """

    plan: Plan
    classes: list[dict[str, np.ndarray | None]]
    world: int
    accumulate: int

    def again(self, *, reverse: bool = False) -> Plan:
        return made(self.classes, self.plan.rules, step=-1 if reverse else 1)

    @property
    def worlds(self) -> list[int]:
        """All numbers of ranks that divide the groups of a batch."""
        groups = self.plan.batch // self.plan.ratio.group
        return [world for world in range(1, groups + 1) if groups % world == 0]


def made(classes: list[dict[str, Any]], rules: PlanRules, step: int = 1) -> Plan:
    anchor, *others = (
        by_depth(**{name: None if it is None else it[::step] for name, it in each.items()})
        for each in classes
    )
    return plan_of(anchor, others, rules)


@st.composite
def cases(draw: st.DrawFn, *, weights: bool | None = None, budget: bool | None = None) -> Case:
    ratio = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    world, accumulate = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    groups = world * accumulate * draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    deepest = draw(st.sampled_from([None, 1, 4, 90]))
    classes: list[dict[str, Any]] = []
    for part in ratio:
        # Twice a step always suffices; fewer do where passes and steps fit.
        spare = 200 // len(ratio) if classes else 60
        count = draw(st.integers(2 * groups * part, 2 * groups * part + spare))
        # Some classes reach beyond others on either side.
        shift = draw(st.sampled_from([0, 3])) if deepest else 0
        weighted = bool(classes) and (draw(st.booleans()) if weights is None else weights)
        classes.append(
            {
                "clips": 5 * rng.permutation(count) + len(classes),
                "depths": rng.integers(1, deepest + 1, count) + shift if deepest else None,
                "weights": rng.exponential(1, count) ** 3 if weighted else None,
                "groups": rng.integers(0, 4, count) if weighted and draw(st.booleans()) else None,
            }
        )
    batch = groups * sum(ratio)
    max_voxels = None
    if draw(st.booleans()) if budget is None else budget:
        max_voxels = draw(st.integers(1, 4 * 10 * (deepest or 1) * batch))
    matching: Matching = draw(st.sampled_from(["matched", "natural"]))
    seed = draw(st.integers(0, 2**32))
    rules = PlanRules(batch, ClassRatio(ratio), seed, matching, max_voxels, frame_voxels=10)
    return Case(made(classes, rules), classes, world, accumulate)


def walk(plan: Plan, epochs: int) -> list[np.ndarray]:
    """The global batches of the first epochs, in groups: [groups, clips of a group] each."""
    steps = range(plan.first_step(epochs))
    return [plan.global_batch(step).reshape(-1, plan.ratio.group) for step in steps]


def of_class(groups: np.ndarray, ratio: ClassRatio, number: int) -> np.ndarray:
    """The clips of one class in groups: [groups, its quota]."""
    first = sum(ratio[:number])
    return groups[:, first : first + ratio[number]]


@given(cases(), st.integers(0, 10**12))
def test_every_micro_batch_has_the_exact_ratio(case: Case, step: int) -> None:
    clips = case.plan.clips_at(step)
    for rank in range(case.world):
        batches = case.plan.rank_batches(
            step, rank=rank, world=case.world, accumulate=case.accumulate
        )
        assert batches.shape == (case.accumulate, clips // case.world // case.accumulate)
        groups = batches.shape[1] // case.plan.ratio.group
        for number, quota in enumerate(case.plan.ratio):
            assert ((batches % 5 == number).sum(axis=1) == groups * quota).all()


@given(cases(), st.integers(0, 10**12))
def test_one_step_repeats_no_clip_and_ranks_are_disjoint(case: Case, step: int) -> None:
    batch = case.plan.global_batch(step)
    assert batch.dtype == np.int64
    assert len(set(batch.tolist())) == len(batch) == case.plan.clips_at(step)
    assert len(batch) % case.plan.batch == 0


@given(cases(), st.integers(0, 10_000))
def test_ranks_together_see_the_same_batch_at_every_world_size(case: Case, step: int) -> None:
    whole = case.plan.global_batch(step)
    for world in case.worlds:
        for accumulate in (a for a in case.worlds if case.worlds[-1] // world % a == 0):
            parts = [
                case.plan.rank_batches(step, rank=rank, world=world, accumulate=accumulate)
                for rank in range(world)
            ]
            # A micro-batch of all ranks is a part of the whole, whatever their number.
            np.testing.assert_array_equal(np.stack(parts, axis=1).reshape(-1), whole)


@given(cases())
def test_each_clip_of_the_anchor_comes_once_a_pass(case: Case) -> None:
    """The steps of an epoch hold its pass, but the last step may take clips of the next pass."""
    plan, epochs = case.plan, 4
    steps = [of_class(groups, plan.ratio, 0).ravel().tolist() for groups in walk(plan, epochs)]
    everyone = sorted(plan.anchor.clips.tolist())
    carried: list[int] = []
    for epoch in range(epochs):
        of_epoch = steps[plan.first_step(epoch) : plan.first_step(epoch + 1)]
        seen = carried + [clip for step in of_epoch for clip in step]
        # The clips that complete the last step are the head of the next pass.
        carried = plan.anchor.clips[plan.order.head(epoch + 1)].tolist()
        assert len(carried) == plan.epochs.head(epoch + 1)
        assert set(carried) <= set(of_epoch[-1])
        for clip in carried:
            # The last occurrence: the pass's own may be anywhere.
            del seen[len(seen) - 1 - seen[::-1].index(clip)]
        assert sorted(seen) == everyone


@given(cases(weights=False))
def test_no_clip_comes_again_before_all_others_of_its_bin_came(case: Case) -> None:
    """Checked at each step's end, across the ends of epochs and passes."""
    plan = case.plan
    steps = walk(plan, 5)
    for number, other in enumerate(plan.others, 1):
        starts = other.bins.starts
        if case.classes[number]["depths"] is None:
            assert len(starts) == 2, "without depths all clips of a class are one bin"
        index = {clip: i for i, clip in enumerate(other.clips.clips.tolist())}
        counts = np.zeros(len(other.clips), np.int64)
        for groups in steps:
            drawn = of_class(groups, plan.ratio, number)
            np.add.at(counts, [index[clip] for clip in drawn.ravel().tolist()], 1)
            for first, last in pairwise(starts):
                passes, rest = divmod(int(counts[first:last].sum()), int(last - first))
                assert counts[first:last].min() == passes
                assert counts[first:last].max() == passes + (rest > 0)


@given(cases(), st.data())
def test_first_steps_and_the_resumed_rest_are_the_uninterrupted_run(
    case: Case, data: st.DataObject
) -> None:
    """Across ends of epochs, and at any number of ranks that divides the batch."""
    plan, steps = case.plan, case.plan.first_step(3)
    stopped = data.draw(st.integers(0, steps))
    straight = [plan.global_batch(step).tolist() for step in range(steps)]
    parts = []
    for first, last in ((0, stopped), (stopped, steps)):
        world, fresh = data.draw(st.sampled_from(case.worlds)), case.again()
        for step in range(first, last):
            ranks = [
                fresh.rank_batches(step, rank=rank, world=world, accumulate=1)
                for rank in range(world)
            ]
            parts.append(np.concatenate(ranks, axis=None).tolist())
    assert parts == straight


@given(cases(), st.permutations(range(3)))
def test_the_order_of_the_arguments_does_not_matter(case: Case, order: list[int]) -> None:
    other = case.again(reverse=True)
    assert other.fingerprint == case.plan.fingerprint
    for step in order:
        np.testing.assert_array_equal(other.global_batch(step), case.plan.global_batch(step))


@given(cases(), st.integers(0, 200))
def test_epochs_begin_where_they_say(case: Case, epoch: int) -> None:
    plan = case.plan
    first, after = plan.first_step(epoch), plan.first_step(epoch + 1)
    assert first < after
    assert plan.epoch_of(first) == epoch == plan.epoch_of(after - 1)
    assert first == 0 or plan.epoch_of(first - 1) == epoch - 1
    if plan.rules.max_voxels is None:
        assert first == math.ceil(epoch * (len(plan.anchor) / plan.epochs.per_block))


@given(cases())
def test_depths_are_those_of_the_clips(case: Case) -> None:
    depths: dict[int, int] = {}
    for each in case.classes:
        clips, own = each["clips"].tolist(), each["depths"]
        depths |= dict.fromkeys(clips, 1) if own is None else dict(zip(clips, own, strict=True))
    for step in range(case.plan.first_step(1)):
        expected = [depths[clip] for clip in case.plan.global_batch(step).tolist()]
        assert case.plan.depths(step).tolist() == expected


@given(cases(budget=True))
def test_steps_stay_within_the_voxel_budget(case: Case) -> None:
    plan, budget = case.plan, case.plan.rules.max_voxels
    for step in range(plan.first_step(4)):
        voxels = plan.clips_at(step) * int(plan.depths(step).max()) * 10
        assert voxels <= budget or plan.clips_at(step) == plan.batch


@pytest.mark.parametrize("budget", range(6000, 60_000, 9000))
def test_budget_holds_where_each_clip_is_deeper_than_the_one_before(budget: int) -> None:
    """With these depths any shuffling of the row, or carrying over, makes a step deeper."""
    plan = plan_of_counts(
        1000,
        3000,
        batch=12,
        ratio=(1, 1),
        positive_depths=np.arange(1000) + 100,
        negative_depths=np.arange(3000) // 3 + 100,
        max_voxels=budget,
    )
    assert plan.order.window == 3
    for step in range(plan.first_step(12)):
        clips = plan.clips_at(step)
        assert clips * plan.depths(step).max() <= budget or clips == 12


@given(cases(), st.integers(0, 3))
def test_no_step_takes_more_of_a_bin_than_the_bin_is_made_for(case: Case, epoch: int) -> None:
    plan = case.plan
    for step in range(plan.first_step(epoch), plan.first_step(epoch + 1)):
        groups = plan.global_batch(step).reshape(-1, plan.ratio.group)
        for number, other in enumerate(plan.others, 1):
            index = {clip: i for i, clip in enumerate(other.clips.clips.tolist())}
            taken = [index[clip] for clip in of_class(groups, plan.ratio, number).ravel().tolist()]
            bins = np.searchsorted(other.bins.starts, taken, side="right") - 1
            most = other.bins.most
            assert (np.bincount(bins, minlength=len(most)) <= most).all()


@given(cases(budget=True))
def test_weights_of_steps_make_the_loss_a_mean_over_clips(case: Case) -> None:
    """Over a period of epochs the weights sum to the number of steps, so their mean is 1."""
    plan = case.plan
    steps = plan.first_step(plan.epochs.period)
    if steps > 2000:
        return
    clips = np.array([plan.clips_at(step) for step in range(steps)])
    weights = np.array([plan.weight(step) for step in range(steps)])
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(weights * clips.mean(), clips)


def test_a_budget_makes_shallow_steps_large_and_all_steps_alike_in_cost() -> None:
    rng = np.random.default_rng(0)
    plan = plan_of_counts(
        4000,
        56_000,
        batch=8,
        positive_depths=rng.integers(20, 200, 4000),
        negative_depths=rng.integers(20, 200, 56_000),
        max_voxels=160_000,
        frame_voxels=100,
    )
    steps = range(plan.first_step(1))
    clips = np.array([plan.clips_at(step) for step in steps])
    voxels = clips * [int(plan.depths(step).max()) for step in steps] * 100
    assert clips.max() >= 7 * 8
    assert clips.min() == 8
    # A step of k blocks had no room for one more, so at least k / (k + 1) of the budget is used.
    assert (voxels <= 160_000).all()
    assert np.median(voxels) > 0.7 * 160_000


def plan_of_counts(
    positives: int = 40, negatives: int = 200, *, batch: int = 16, seed: int = 0, **more: Any
) -> Plan:
    return make_plan(
        np.arange(positives),
        np.arange(positives, positives + negatives),
        **{"batch": batch, "ratio": (1, 3), "seed": seed, **more},
    )


@pytest.mark.parametrize("take", range(1, 8))
def test_however_few_the_clips_no_step_repeats_one(take: int) -> None:
    """Every count that is accepted, down to the smallest, where the ends of passes touch."""
    checked = 0
    for count in range(take, 2 * take + 2):
        for seed in range(6):
            try:
                plan = plan_of_counts(count, count, batch=2 * take, seed=seed, ratio=(1, 1))
            except PlanError:
                continue
            for groups in walk(plan, 9):
                for clips in groups.T.tolist():
                    assert len(set(clips)) == take
            checked += 1
    assert checked >= 12


def test_one_positive_is_in_every_step() -> None:
    plan = plan_of_counts(1, 10, batch=4)
    assert [plan.first_step(epoch) for epoch in range(4)] == [0, 1, 2, 3]
    batches = [plan.global_batch(step).tolist() for step in range(20)]
    assert all(batch[0] == 0 and len(set(batch)) == 4 for batch in batches)
    assert {clip for batch in batches for clip in batch} == set(range(11))


def test_order_is_pinned() -> None:
    """Golden values: changing them breaks every run that must be reproduced or resumed."""
    banded = {
        "positive_depths": np.random.default_rng(0).integers(20, 90, 40),
        "negative_depths": np.arange(200) + 1,
        "weights": np.arange(200) % 7 + 1.0,
        "max_voxels": 4000,
    }
    plans = plan_of_counts(seed=7), plan_of_counts(seed=7, **banded)
    assert plans[0].global_batch(0).tolist() == GOLDEN_FIRST
    assert [plan.fingerprint for plan in plans] == GOLDEN_FINGERPRINTS
    for plan, golden in zip(plans, GOLDEN_DIGESTS, strict=True):
        batches = np.concatenate([plan.global_batch(step) for step in range(200)])
        assert hashlib.sha256(batches.astype("<i8").tobytes()).hexdigest()[:16] == golden


def test_fingerprint_tells_plans_apart() -> None:
    ones = np.ones(200, np.int64)
    plans = [
        plan_of_counts(),
        plan_of_counts(seed=1),
        plan_of_counts(batch=32),
        plan_of_counts(41),
        plan_of_counts(40, 199),
        plan_of_counts(ratio=(1, 1)),
        plan_of_counts(matching="natural"),
        plan_of_counts(max_voxels=100),
        plan_of_counts(max_voxels=100, frame_voxels=2),
        plan_of_counts(weights=np.arange(200) + 1.0),
        plan_of_counts(weights=np.arange(200) + 2.0),
        plan_of_counts(groups=np.arange(200) // 150),
        plan_of_counts(negative_depths=ones + 1),
        plan_of_counts(negative_depths=ones + (np.arange(200) > 100)),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert plan_of_counts().fingerprint == plan_of_counts().fingerprint
    assert len(plan_of_counts().fingerprint) == 16


def test_a_caller_cannot_change_the_order() -> None:
    plan = plan_of_counts()
    before = plan.global_batch(3).copy()
    plan.global_batch(3)[:] = -1
    plan.depths(3)[:] = -1
    np.testing.assert_array_equal(plan.global_batch(3), before)


@pytest.mark.parametrize(
    ("positives", "negatives", "message"),
    [
        (0, 200, "has 0 positives; a batch with 4 different"),
        (3, 200, "has 3 positives"),
        (5, 200, "has 5 positives; .* at least 7"),
        (40, 0, "has 0 negatives"),
        (40, 11, "has 11 negatives; .* at least 22"),
    ],
)
def test_too_few_clips_name_the_class_and_the_fix(
    positives: int, negatives: int, message: str
) -> None:
    deep = {
        "positive_depths": np.arange(positives) + 1,
        "negative_depths": np.arange(negatives) + 1,
    }
    for depths in ({}, deep):
        with pytest.raises(PlanError, match=f"{message}.*Lower plan.batch, or select more"):
            plan_of_counts(positives, negatives, **depths)


@pytest.mark.parametrize(
    ("batch", "counts", "message"),
    [
        (9, (40, 40, 40), r"batch 9 is not a multiple of 1 a \+ 2 b \+ 3 c = 6"),
        (12, (1, 40, 40), r"has 1 a; .* 2 different a needs"),
        (12, (40, 5, 40), r"has 5 b; .* 4 different b needs at least 6"),
        (12, (40, 40, 9), r"has 9 c; .* 6 different c needs at least 10"),
    ],
)
def test_a_quota_of_three_that_cannot_be_met_names_the_class(
    batch: int, counts: tuple[int, ...], message: str
) -> None:
    classes = [
        by_depth(np.arange(count), None, name=name)
        for name, count in zip("abc", counts, strict=True)
    ]
    with pytest.raises(PlanError, match=message):
        plan_of(classes[0], classes[1:], PlanRules(batch, ClassRatio((1, 2, 3)), 0))


@pytest.mark.parametrize(("world", "accumulate"), [(3, 1), (2, 4)])
def test_batch_that_cannot_be_cut(world: int, accumulate: int) -> None:
    group = 4 * world * accumulate
    with pytest.raises(PlanError, match=f"plan.batch 16 cannot be cut.*multiple of {group}"):
        plan_of_counts().rank_batches(0, rank=0, world=world, accumulate=accumulate)
