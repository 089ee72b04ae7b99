"""What each rank is given: the plan's slots in training, every clip in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import make_plan

from dist_train.data.loading.sampler import PlanSampler, Slot, dealt_batches, held_out_batches
from dist_train.errors import PlanError

PLAN = make_plan(np.arange(10), np.arange(10, 60), batch=16, ratio=(1, 3), seed=0)
FRAMES = st.lists(st.integers(1, 90), max_size=70)


def sampler(*, rank: int = 0, world: int = 1, accumulate: int = 1, first: int = 0, last: int = 9):
    return PlanSampler(PLAN, rank=rank, world=world, accumulate=accumulate, first=first, last=last)


def test_slots_are_the_plan_s_with_the_epoch_of_their_step() -> None:
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 9
    for step, batch in enumerate(batches):
        assert [slot.clip for slot in batch] == PLAN.global_batch(step).tolist()
        assert {slot.epoch for slot in batch} == {PLAN.epoch_of(step)}
    assert batches[-1][0].epoch == 3
    # A slot is sent to worker processes.
    assert {type(number) for number in batches[0][0]} == {int}


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_cut_the_global_batch(world: int, accumulate: int) -> None:
    ranks = [list(sampler(rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    assert all(len(batches) == 9 * accumulate for batches in ranks)
    for step in range(9):
        joined = [
            slot.clip
            for micro in range(step * accumulate, (step + 1) * accumulate)
            for batches in ranks
            for slot in batches[micro]
        ]
        assert joined == PLAN.global_batch(step).tolist()


def test_resumed_sampler_goes_on_where_it_stopped() -> None:
    straight = list(sampler(world=2, accumulate=2))
    resumed = [*sampler(world=2, accumulate=2, last=4), *sampler(world=2, accumulate=2, first=4)]
    assert resumed == straight


def test_steps_of_a_voxel_budget_differ_in_size_alike_on_all_ranks() -> None:
    rng = np.random.default_rng(0)
    plan = make_plan(
        np.arange(60),
        np.arange(60, 600),
        batch=8,
        ratio=(1, 3),
        seed=0,
        positive_depths=rng.integers(10, 100, 60),
        negative_depths=rng.integers(10, 100, 540),
        max_voxels=8 * 100,
    )
    last = plan.first_step(2)
    ranks = [
        list(PlanSampler(plan, rank=rank, world=2, accumulate=1, first=0, last=last))
        for rank in range(2)
    ]
    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert sizes[0] == sizes[1] == [plan.clips_at(step) // 2 for step in range(last)]
    assert len(set(sizes[0])) > 2


def test_cut_that_is_impossible_is_refused_at_once() -> None:
    with pytest.raises(PlanError, match="cannot be cut into 3 processes"):
        sampler(world=3)


@given(FRAMES, st.integers(1, 5), st.integers(1, 9))
def test_held_out_clips_are_seen_once_over_all_ranks(
    frames: list[int], world: int, batch: int
) -> None:
    clips = [100 + i for i in range(len(frames))]
    ranks = [
        held_out_batches(clips, frames, rank=r, world=world, batch=batch) for r in range(world)
    ]
    seen = [slot.clip for rank in ranks for slots in rank for slot in slots]
    assert sorted(set(seen)) == clips
    assert len(seen) - len(clips) < world, "only the last round holds clips a second time"
    for rank in ranks:
        assert [len(slots) for slots in rank] == [len(slots) for slots in ranks[0]]
        assert all(0 < len(slots) <= batch for slots in rank)


@given(FRAMES.filter(bool), st.integers(2, 5))
def test_ranks_have_like_work_on_held_out_clips(frames: list[int], world: int) -> None:
    """Two ranks differ by the frames of two clips at most: one for all rounds of the dealing, as
    each begins where the one before ended, and one for the last round."""
    clips = list(range(len(frames)))
    ranks = [held_out_batches(clips, frames, rank=r, world=world, batch=4) for r in range(world)]
    work = [sum(frames[slot.clip] for slots in rank for slot in slots) for rank in ranks]
    assert max(work) - min(work) <= 2 * (max(frames) - min(frames))


def test_held_out_batches_hold_clips_of_like_depth() -> None:
    depths = np.random.default_rng(0).integers(17, 435, 400).tolist()
    batches = held_out_batches(list(range(400)), depths, rank=1, world=2, batch=8)
    padding = [max(depths[s.clip] for s in b) - min(depths[s.clip] for s in b) for b in batches]
    assert max(padding) < 40
    assert batches[0][0] == Slot(batches[0][0].clip, 0)


@given(FRAMES, st.integers(1, 5), st.integers(1, 9))
def test_dealt_batches_are_the_same_for_any_number_of_ranks(
    frames: list[int], world: int, batch: int
) -> None:
    clips = [100 + i for i in range(len(frames))]
    ranks = [dealt_batches(clips, frames, rank=r, world=world, batch=batch) for r in range(world)]
    alone = dealt_batches(clips, frames, rank=0, world=1, batch=batch)
    assert sorted(slots for rank in ranks for slots in rank) == sorted(alone)
    assert sorted(slot.clip for slots in alone for slot in slots) == clips
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
