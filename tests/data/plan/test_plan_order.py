"""Sorting by depth saves padding, and the order of training reveals nothing."""

from __future__ import annotations

import csv
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from plans import make_plan

from dist_train.data.plan.plan import Plan

RANK_BATCH = 4


def plan_over(positives: np.ndarray, negatives: np.ndarray, ranks: int, **more: object) -> Plan:
    return make_plan(
        np.arange(len(positives)),
        len(positives) + np.arange(len(negatives)),
        batch=ranks * RANK_BATCH,
        ratio=(1, 3),
        positive_depths=positives,
        negative_depths=negatives,
        **{"seed": 0, **more},
    )


@pytest.fixture(scope="module")
def depths() -> tuple[np.ndarray, np.ndarray]:
    """Depths of 600 positives and 40,000 negatives, distributed like real ones. The negatives are
    a little shallower."""
    rng = np.random.default_rng(0)
    drawn = [rng.lognormal(mean, 0.3, n).astype(int) + 10 for mean, n in ((4, 600), (3.9, 40_000))]
    return drawn[0], drawn[1]


@pytest.fixture(scope="module")
def challenge(real_data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The challenge's 1,887 positives and 571,161 negatives. The positives have the depths of the
    stalled clips in its labelled subset."""
    with (real_data / "clog_loss_depths.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    frames, everything, stalled = (
        np.array([int(row[name]) for row in rows])
        for name in ("num_frames", "all", "micro_stalled")
    )
    ends = np.rint(np.cumsum(stalled) / stalled.sum() * 1887).astype(int)
    positives = np.diff(ends, prepend=0)
    return np.repeat(frames, positives), np.repeat(frames, np.maximum(everything - positives, 0))


def steps_of(plan: Plan, epoch: int) -> range:
    return range(plan.first_step(epoch), plan.first_step(epoch + 1))


@pytest.fixture(scope="module")
def mean_depths(depths: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Mean depth of each step: [12 epochs, steps]."""
    plan = plan_over(*depths, 8)
    return np.array(
        [[plan.depths(step).mean() for step in steps_of(plan, epoch)] for epoch in range(12)]
    )


def efficiency(plan: Plan, epochs: int) -> float:
    """Real frames over padded frames, averaged over steps; a step is padded to its deepest clip."""
    steps = [plan.depths(step) for step in range(plan.first_step(epochs))]
    return float(np.mean([depths.mean() / depths.max() for depths in steps]))


@pytest.mark.parametrize(
    ("ranks", "epochs", "least"), [(8, 1, 0.985), (64, 6, 0.96), (512, 8, 0.75)]
)
def test_nearly_all_padded_frames_are_true_ones(
    challenge: tuple[np.ndarray, np.ndarray], ranks: int, epochs: int, least: float
) -> None:
    """With 512 ranks an epoch has four steps, one of which holds the deepest clips."""
    assert efficiency(plan_over(*challenge, ranks), epochs) >= least


def test_random_order_pads_as_much_again(depths: tuple[np.ndarray, np.ndarray]) -> None:
    """The plan without depths."""
    both = np.concatenate(depths)
    positives, negatives = np.split(np.arange(len(both)), [len(depths[0])])
    plan = make_plan(positives, negatives, batch=32, ratio=(1, 3), seed=0)
    found = [both[plan.global_batch(step)] for step in range(100)]
    assert np.mean([of_step.mean() / of_step.max() for of_step in found]) < 0.65
    assert efficiency(plan_over(*depths, 8), 1) > 0.95


def test_a_step_s_depth_tells_nothing_of_the_next(mean_depths: np.ndarray) -> None:
    """Autocorrelation of the steps' mean depths, within and across epochs."""
    found = mean_depths.ravel()
    centred = found - found.mean()
    for lag in range(1, 11):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.var()
        # Four standard errors, and what an order without repetition inside an epoch explains.
        assert abs(correlation) < 4 / math.sqrt(len(found)) + 1 / 75


def test_no_long_runs_of_one_band(mean_depths: np.ndarray) -> None:
    """Among 900 coin flips, a run longer than 16 has a probability below 1 %."""
    changes = np.flatnonzero(np.diff(mean_depths.ravel() > np.median(mean_depths)))
    assert np.diff(changes).max() <= 16
    # And about every other step changes half.
    assert 0.4 < len(changes) / mean_depths.size < 0.6


def test_bands_come_in_another_order_each_epoch(mean_depths: np.ndarray) -> None:
    steps = mean_depths.shape[1]
    ranks = np.argsort(np.argsort(mean_depths))
    correlation = np.corrcoef(ranks)[np.triu_indices(12, 1)]
    assert np.abs(correlation).max() < 4 / math.sqrt(steps)
    # The deepest band comes early and late.
    places = ranks.argmax(axis=1)
    assert places.min() < steps / 3
    assert places.max() > 2 * steps / 3


def test_partners_change_from_epoch_to_epoch(depths: tuple[np.ndarray, np.ndarray]) -> None:
    """Few pairs of positives share a step again: many clips have the same depth, and the edges of
    the blocks are shuffled."""
    plan = plan_over(*depths, 8)
    pairs = []
    for epoch in range(4):
        found = set()
        for step in steps_of(plan, epoch):
            positives = np.sort(plan.global_batch(step).reshape(-1, 4)[:, 0])
            found.update(combinations(positives.tolist(), 2))
        pairs.append(found)
    for one, other in combinations(pairs, 2):
        assert len(one & other) / len(one) < 0.5


def depths_by_class(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Depths of the first epoch's positives [groups, 1] and negatives [groups, 3]."""
    drawn = np.concatenate([plan.depths(step).reshape(-1, 4) for step in steps_of(plan, 0)])
    return drawn[:, :1], drawn[:, 1:]


def test_matched_negatives_have_the_positives_depths(depths: tuple[np.ndarray, np.ndarray]) -> None:
    """Over an epoch exactly, to the width of a bin; in each step nearly."""
    positives, negatives = depths_by_class(plan_over(*depths, 8))
    assert abs(negatives.mean() - positives.mean()) < 0.01 * positives.mean()
    grid = np.linspace(0, 1, 21)[1:-1]
    np.testing.assert_allclose(
        np.quantile(negatives, grid), np.quantile(positives, grid), rtol=0.02, atol=1
    )
    assert np.abs(positives - negatives).mean() < 0.5


def test_natural_negatives_have_their_own_depths(depths: tuple[np.ndarray, np.ndarray]) -> None:
    positives, negatives = depths_by_class(plan_over(*depths, 8, matching="natural"))
    assert abs(negatives.mean() - depths[1].mean()) < 0.01 * depths[1].mean()
    # The model can learn depth from them: deep steps have deeper positives than negatives.
    assert (positives - negatives).mean() > 0.03 * depths[1].mean()


def test_ranks_take_turns_with_the_shallow_clips(depths: tuple[np.ndarray, np.ndarray]) -> None:
    """A micro-batch holds clips of similar depth, but no rank always gets the shallow ones."""
    plan = plan_over(*depths, 64)
    off, own_deepest = [], []
    for step in range(60):
        of_ranks = plan.depths(step).reshape(8, -1)
        off.append(of_ranks.mean(axis=1) - of_ranks.mean())
        own_deepest.append((of_ranks.max(axis=1) / of_ranks.max()).mean())
    # The mean of each rank over the steps is off by no more than chance has it.
    assert np.abs(np.mean(off, axis=0)).max() < 4 * np.std(off) / math.sqrt(60)
    assert np.mean(own_deepest) < 0.97
