"""The order of training: what it promises, for any seed, size, ratio and cut."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.plan import Plan, Stream, make_plan
from dist_train.errors import PlanError

GOLDEN_FIRST = [30, 75, 128, 213, 39, 80, 180, 152, 37, 78, 218, 93, 35, 132, 129, 100]
GOLDEN_WALK = "465a66e51dd7ce89"
GOLDEN_FINGERPRINT = "b4c085c83dee51bf"


@dataclass(frozen=True)
class Case:
    """A plan whose positives are even numbers and whose negatives are odd, and a cut of it."""

    plan: Plan
    world: int
    accumulate: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    p, q = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    world, accumulate = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups = world * accumulate * draw(st.integers(1, 2))
    positives, negatives = (
        # Twice a step always suffices; fewer do where passes and steps fit.
        draw(st.integers(2 * groups * part, 2 * groups * part + 40))
        for part in (p, q)
    )
    plan = make_plan(
        2 * np.arange(positives),
        2 * np.arange(negatives) + 1,
        batch=groups * (p + q),
        ratio=(p, q),
        seed=draw(st.integers(0, 2**32)),
    )
    return Case(plan, world, accumulate)


def steps_of_passes(stream: Stream, passes: int) -> int:
    return math.ceil(passes * len(stream.clips) / stream.take)


@given(cases(), st.integers(0, 10_000))
def test_every_micro_batch_has_the_exact_ratio(case: Case, step: int) -> None:
    p, q = case.plan.ratio
    for rank in range(case.world):
        batches = case.plan.rank_batches(
            step, rank=rank, world=case.world, accumulate=case.accumulate
        )
        assert batches.shape == (
            case.accumulate,
            case.plan.batch // case.world // case.accumulate,
        )
        positives = (batches % 2 == 0).sum(axis=1)
        assert (positives * (p + q) == batches.shape[1] * p).all()


@given(cases(), st.integers(0, 10_000))
def test_one_step_repeats_no_clip_and_ranks_are_disjoint(case: Case, step: int) -> None:
    batch = case.plan.global_batch(step)
    assert batch.dtype == np.int64
    assert len(set(batch.tolist())) == case.plan.batch


@given(cases(), st.integers(0, 10_000))
def test_ranks_together_see_the_same_batch_at_every_world_size(case: Case, step: int) -> None:
    whole = case.plan.global_batch(step)
    groups = case.plan.batch // sum(case.plan.ratio)
    for world in (w for w in range(1, groups + 1) if groups % w == 0):
        for accumulate in (a for a in range(1, groups // world + 1) if groups // world % a == 0):
            parts = [
                case.plan.rank_batches(step, rank=rank, world=world, accumulate=accumulate)
                for rank in range(world)
            ]
            np.testing.assert_array_equal(np.concatenate(parts, axis=None), whole)


@given(cases())
def test_each_pass_holds_each_clip_once(case: Case) -> None:
    for stream in (case.plan.positives, case.plan.negatives):
        count = len(stream.clips)
        walk = np.concatenate([stream.at_step(s) for s in range(steps_of_passes(stream, 4))])
        for number in range(4):
            window = walk[number * count : (number + 1) * count]
            np.testing.assert_array_equal(np.sort(window), stream.clips)


@given(cases(), st.integers(0, 60))
def test_a_step_is_the_same_however_it_is_reached(case: Case, step: int) -> None:
    """Also from a fresh plan, whose caches are cold."""
    for walked in range(step):
        case.plan.global_batch(walked)
    old = case.plan
    fresh = make_plan(
        old.positives.clips,
        old.negatives.clips,
        batch=old.batch,
        ratio=old.ratio,
        seed=old.positives.seed,
    )
    np.testing.assert_array_equal(fresh.global_batch(step), old.global_batch(step))


@given(cases(), st.integers(0, 200))
def test_epochs_begin_where_they_say(case: Case, epoch: int) -> None:
    plan = case.plan
    first = plan.first_step(epoch)
    assert plan.epoch_of(first) == epoch
    assert first == 0 or plan.epoch_of(first - 1) == epoch - 1
    length = plan.first_step(epoch + 1) - first
    exact = len(plan.positives.clips) / plan.positives.take
    assert math.floor(exact) <= length <= math.ceil(exact)


def test_twice_a_step_is_always_enough() -> None:
    for take in range(1, 13):
        for count in range(2 * take - 1, 4 * take):
            assert Stream(np.arange(count), take, 0, "positives").take == take


@pytest.mark.parametrize("take", range(1, 8))
def test_however_few_the_clips_no_step_repeats_one(take: int) -> None:
    """Every count that is not refused, down to the smallest, where the ends of passes touch."""
    passes, checked = 9, 0
    for count in range(take, 2 * take + 1):
        for seed in range(12):
            try:
                stream = Stream(np.arange(count), take, seed, "positives")
            except PlanError:
                continue
            walk = np.concatenate(
                [stream.at_step(step) for step in range(steps_of_passes(stream, passes))]
            )
            for clips in walk.reshape(-1, take):
                assert len(set(clips.tolist())) == take
            for clips in walk[: passes * count].reshape(passes, count):
                assert sorted(clips.tolist()) == list(range(count))
            checked += 1
    assert checked >= 24


def plan_of(positives: int = 40, negatives: int = 200, *, batch: int = 16, seed: int = 0) -> Plan:
    return make_plan(
        np.arange(positives),
        np.arange(positives, positives + negatives),
        batch=batch,
        ratio=(1, 3),
        seed=seed,
    )


def test_seeds_and_passes_and_classes_differ_in_order() -> None:
    orders = {
        tuple(Stream(np.arange(50), 10, seed, name).order(number).tolist())
        for seed in range(3)
        for number in range(3)
        for name in ("positives", "negatives")
    }
    assert len(orders) == 18


def test_order_is_pinned() -> None:
    """Golden: a change here changes every run that anybody has to reproduce or resume."""
    plan = plan_of(seed=7)
    assert plan.global_batch(0).tolist() == GOLDEN_FIRST
    digest = hashlib.sha256()
    for step in range(200):
        digest.update(plan.global_batch(step).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN_WALK
    assert plan.fingerprint == GOLDEN_FINGERPRINT


def test_order_is_that_of_another_process() -> None:
    command = (
        "import numpy as np; from dist_train.data.plan import make_plan;"
        "plan = make_plan(np.arange(40), np.arange(40, 240), batch=16, ratio=(1, 3), seed=7);"
        "print(plan.fingerprint, *plan.global_batch(123))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True
    ).stdout.split()
    plan = plan_of(seed=7)
    assert printed == [plan.fingerprint, *map(str, plan.global_batch(123))]


def test_fingerprint_tells_plans_apart() -> None:
    plans = [
        plan_of(),
        plan_of(seed=1),
        plan_of(batch=32),
        plan_of(41),
        plan_of(40, 199),
        make_plan(np.arange(40), np.arange(40, 240), batch=16, ratio=(1, 1), seed=0),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert plan_of().fingerprint == plan_of().fingerprint


def test_a_caller_cannot_change_the_order() -> None:
    plan = plan_of()
    before = plan.global_batch(3).copy()
    for stream in (plan.positives, plan.negatives):
        stream.at_step(3)[:] = -1
    np.testing.assert_array_equal(plan.global_batch(3), before)


def test_place_of_a_clip_is_uniform() -> None:
    """Chi-square over ten bins of a clip's place, over 2000 passes: 99.9 % of a uniform law's
    statistics of nine degrees of freedom lie below 27.9; of twelve clips none may be far above."""
    stream = Stream(np.arange(100), 10, 0, "positives")
    places = np.array([np.argsort(stream.sorted_by_hash(number)) for number in range(2000)])
    for clip in range(0, 100, 9):
        counts = np.bincount(places[:, clip] // 10, minlength=10)
        assert ((counts - 200.0) ** 2 / 200).sum() < 35


def test_neighbours_are_not_kept_together() -> None:
    """Clips of one project are neighbours in number; in a random order of N the mean distance of
    two places is (N + 1) / 3."""
    stream = Stream(np.arange(1000), 10, 3, "negatives")
    places = np.argsort(stream.order(0))
    distance = np.abs(np.diff(places)).mean()
    assert distance == pytest.approx(1001 / 3, rel=0.08)


def test_passes_are_independent() -> None:
    stream = Stream(np.arange(1000), 10, 3, "negatives")
    places = np.array([np.argsort(stream.order(number)) for number in range(20)])
    correlation = np.corrcoef(places)[np.triu_indices(20, 1)]
    # The standard error of one is 1 / sqrt(999).
    assert np.abs(correlation).max() < 5 / math.sqrt(999)


@pytest.mark.parametrize(
    ("positives", "negatives", "message"),
    [
        (0, 200, "holds 0 positives for train, and the batch needs 4"),
        (3, 200, "holds 3 positives"),
        (5, 200, "holds 5 positives .* at least 7 are needed"),
        (40, 0, "holds 0 negatives"),
        (40, 11, "holds 11 negatives"),
    ],
)
def test_too_few_clips_name_the_class_and_the_fix(
    positives: int, negatives: int, message: str
) -> None:
    with pytest.raises(PlanError, match=f"{message}.*Lower plan.batch, or select more"):
        plan_of(positives, negatives)


def test_a_batch_beyond_all_measure_is_refused_at_once() -> None:
    with pytest.raises(PlanError, match="holds 40 positives"):
        plan_of(40, 200, batch=4 * 10**12)


@pytest.mark.parametrize("batch", [0, 3, 6, 17])
def test_batch_that_cannot_hold_the_ratio(batch: int) -> None:
    with pytest.raises(PlanError, match=f"plan.batch {batch} cannot hold 1 .* multiple of 4"):
        plan_of(batch=batch)


@pytest.mark.parametrize(("world", "accumulate"), [(3, 1), (1, 3), (2, 4), (8, 1)])
def test_batch_that_cannot_be_cut(world: int, accumulate: int) -> None:
    group = 4 * world * accumulate
    with pytest.raises(PlanError, match=f"plan.batch 16 cannot be cut.*multiple of {group}"):
        plan_of().rank_batches(0, rank=0, world=world, accumulate=accumulate)


def test_half_a_million_clips_start_at_once() -> None:
    """At the scale of the original data; the last step is as near as the first."""
    plan = plan_of(2_000, 500_000, batch=256)
    for step in (0, 10**6):
        assert len(set(plan.global_batch(step).tolist())) == 256
