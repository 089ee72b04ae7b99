"""The parts of the plan, each by itself."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan.depth_bins import RESOLUTION, BinQuotas, depth_bins, least_clips
from dist_train.data.plan.depth_order import by_depth
from dist_train.data.plan.plan import make_plan
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import mix, root_key
from dist_train.data.plan.streams import Streams
from dist_train.data.plan.weights import UNIT, arcs, as_integers
from dist_train.errors import PlanError

# --- quotas ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([1, 3, 16]),
)
def test_shares_are_whole_exact_and_add_up(counts: list[int], p: int, q: int, fine: int) -> None:
    """The formula for the clips given before an epoch equals adding up."""
    quotas = BinQuotas(q * np.append(0, np.cumsum(counts)), p * fine)
    total, given_ = int(quotas.ends[-1]), np.zeros(len(counts), np.int64)
    for epoch in range(2 * quotas.cycle + 3):
        np.testing.assert_array_equal(quotas.before(epoch), given_)
        edges = quotas.edges(epoch)
        each = np.diff(edges)
        assert edges[0] == 0
        assert (each >= 0).all()
        assert (each <= -(-np.diff(quotas.ends) // quotas.cycle)).all()
        asked = (epoch + 1) * total // quotas.cycle - epoch * total // quotas.cycle
        assert edges[-1] == asked
        given_ += each
    # Over a cycle each bin gives exactly its part.
    np.testing.assert_array_equal(quotas.before(quotas.cycle), np.diff(quotas.ends))


# --- bins -----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.lists(st.integers(1, 40), min_size=20, max_size=300),
    st.sampled_from([(1, 3), (2, 1), (3, 5)]),
    st.booleans(),
    st.booleans(),
)
def test_bins_cover_all_negatives_and_have_enough(
    positive: list[int], negative: list[int], ratio: tuple[int, int], straddling: bool, own: bool
) -> None:
    positives = by_depth(np.arange(len(positive)), np.array(positive))
    negatives = by_depth(np.arange(len(negative)), np.array(negative))
    matching = "natural" if own else "matched"
    rules = PlanRules(2 * sum(ratio), ClassRatio(ratio), 0, matching)
    bins = depth_bins(positives, negatives, rules, 1, 1, straddling=straddling)
    assert (bins.starts[0], bins.starts[-1]) == (0, len(negatives))
    assert (np.diff(bins.starts) >= [least_clips(int(most)) for most in bins.most]).all()
    assert (np.diff(bins.quotas.ends) > 0).all()
    per_epoch = Fraction(len(positives) * ratio[1], ratio[0])
    assert Fraction(int(bins.quotas.ends[-1]), bins.quotas.cycle) == per_epoch


def test_a_depth_with_enough_negatives_is_a_bin_of_its_own() -> None:
    positives = by_depth(np.arange(60), np.repeat([50, 51, 90], 20))
    depths = np.repeat([20, 50, 51, 70, 90, 300], [5, 500, 500, 500, 300, 7])
    negatives = by_depth(np.arange(len(depths)), depths)
    bins = depth_bins(
        positives, negatives, PlanRules(64, ClassRatio((1, 3)), 0), 1, 1, straddling=True
    )
    edges = [
        negatives.depth_at(np.array([first, last - 1])).tolist()
        for first, last in pairwise(bins.starts)
    ]
    # No positive has 20, 70 or 300 frames. Those of 70 join their neighbours; the others, beyond
    # all positives, get a token each.
    assert edges == [[20, 20], [50, 50], [51, 70], [90, 90], [300, 300]]
    of_positives = np.diff(bins.quotas.ends) / (3 * RESOLUTION)
    assert of_positives.tolist() == [1 / 64, 20 - 1 / 64, 20, 20 - 1 / 64, 1 / 64]


# --- streams --------------------------------------------------------------------------------------


def one_stream(most: int, weights: np.ndarray, seed: int = 0) -> Streams:
    """The stream of a single bin of clips with these weights."""
    starts, needed = np.array([0, len(weights)]), np.array([max(1, 3 * (most - 1))])
    ends = arcs(weights, starts, np.minimum(needed, len(weights)))
    return Streams(starts, np.array([most]), root_key(seed, "test"), ends, UNIT)


def taken(streams: Streams, number: int) -> np.ndarray:
    """The first ``number`` clips of the stream of the only bin."""
    most = int(streams.most[0])
    parts = [
        streams.take(np.array([0]), np.array([at]), np.array([min(most, number - at)]))
        for at in range(0, number, most)
    ]
    return np.concatenate(parts)


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 99), st.booleans())
def test_any_window_of_a_stream_holds_different_clips(
    most: int, spare: int, seed: int, weighted: bool
) -> None:
    """For any position of steps relative to passes, down to the fewest clips of a bin."""
    if weighted:
        count = 3 * most + spare
        weights = np.random.default_rng(seed).exponential(1, count) ** 2 + 1e-9
        streams = one_stream(most, weights, seed)
    else:
        count = least_clips(most) + spare
        streams = Streams(np.array([0, count]), np.array([most]), root_key(seed, "test"))
    length = int(streams.lengths[0])
    assert length >= max(1, 3 * (most - 1)) if weighted else length == count
    stream = taken(streams, 6 * length)
    for at in range(len(stream) - most + 1):
        assert len(set(stream[at : at + most].tolist())) == most
    for one in stream.reshape(6, length).tolist():
        assert len(set(one)) == length


def test_clips_are_drawn_as_often_as_their_weights_say() -> None:
    """In the long run exact to one or two draws: the golden ratio spreads the points evenly."""
    weights = np.random.default_rng(0).exponential(1, 200) + 0.01
    streams = one_stream(4, weights)
    length = int(streams.lengths[0])
    assert length == math.floor(weights.sum() / weights.max())
    counts = np.bincount(taken(streams, 1000 * length), minlength=200)
    np.testing.assert_allclose(counts, 1000 * length * weights / weights.sum(), atol=8)


def test_weights_that_fit_the_circle_exactly_starve_no_clip() -> None:
    """9 units in passes of 9: an advance by whole units would visit only every second half."""
    weights = np.repeat([1.0, 0.5], [3, 12])
    streams = one_stream(4, weights)
    assert streams.lengths == [9]
    counts = np.bincount(taken(streams, 9 * 100), minlength=15)
    np.testing.assert_allclose(counts, 100 * weights, atol=3)


def test_equal_weights_are_no_weights() -> None:
    """Every clip once per pass, whatever the common weight is."""
    stream = taken(one_stream(5, np.full(50, 0.3)), 150)
    assert [sorted(one.tolist()) for one in stream.reshape(3, 50)] == [list(range(50))] * 3


def test_passes_are_uncorrelated() -> None:
    count = 400
    stream = taken(Streams(np.array([0, count]), np.array([10]), 0), 20 * count)
    places = np.argsort(stream.reshape(20, count), axis=1)
    correlation = np.corrcoef(places)[np.triu_indices(20, 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(count - 1)


def test_neighbours_in_number_are_not_kept_together() -> None:
    """Clips of one project have neighbouring numbers. In a random order of n, the mean distance of
    two places is (n + 1) / 3."""
    plan = make_plan(np.arange(100), np.arange(100, 1100), batch=20, ratio=(1, 1), seed=3)
    drawn = [plan.global_batch(step).reshape(-1, 2)[:, 1] for step in range(100)]
    places = np.argsort(np.concatenate(drawn))
    assert np.abs(np.diff(places)).mean() == pytest.approx(1001 / 3, rel=0.08)


# --- weights --------------------------------------------------------------------------------------


def test_one_great_weight_is_lowered_and_the_others_are_kept() -> None:
    weights = np.append(np.linspace(1, 2, 99), 1000.0)
    ends = arcs(weights, np.array([0, 100]), np.array([30]))
    lengths = np.diff(np.append(0, ends))
    assert ends[-1] // UNIT == 30
    np.testing.assert_allclose(lengths[:99] / lengths[0], weights[:99], rtol=1e-6)
    # A pass of 30 of which one is the great one: the others share 29 draws.
    assert lengths[99] == UNIT == lengths.max()
    assert lengths[99] / lengths[0] == pytest.approx(weights[:99].sum() / 29, rel=0.04)


def drawn_negatives(count: int, steps: int, **settings: np.ndarray) -> np.ndarray:
    """Negatives of the first steps of a plan, numbered from 0."""
    arrays = np.arange(500), np.arange(500, 500 + count)
    plan = make_plan(*arrays, batch=4, ratio=(1, 3), seed=0, **settings)
    return np.concatenate([plan.global_batch(step)[1:] for step in range(steps)]) - 500


def test_groups_are_drawn_alike() -> None:
    groups = np.repeat([0, 1, 2], [10, 100, 1000])
    counts = np.bincount(groups[drawn_negatives(1110, 1000, groups=groups)])
    np.testing.assert_allclose(counts, 1000, rtol=0.03)


def test_a_weight_of_nothing_leaves_a_clip_out() -> None:
    drawn = drawn_negatives(200, 200, weights=np.arange(200) % 2.0)
    assert set(drawn.tolist()) == set(range(1, 200, 2))
    with pytest.raises(PlanError, match="has 0 negatives"):
        drawn_negatives(200, 1, weights=np.zeros(200))


def test_whole_weights_keep_their_ratio_and_are_never_nothing() -> None:
    assert as_integers(np.array([1.0, 0.5, 1e-30])).tolist() == [UNIT, UNIT // 2, 1]


@given(st.data(), st.sampled_from([3, 70_000]), st.booleans())
def test_clips_are_sorted_by_depth_and_hash(data: st.DataObject, most: int, weighted: bool) -> None:
    clips = np.array(data.draw(st.lists(st.integers(0, 2**40), unique=True)), np.int64)
    depths = np.array([data.draw(st.integers(1, most)) for _ in clips], np.int64)
    weights = np.arange(1.0, len(clips) + 1) if weighted else None
    found = by_depth(clips, depths, weights)
    order = np.lexsort((mix(clips.astype(np.uint64)), depths))
    np.testing.assert_array_equal(found.clips, clips[order])
    np.testing.assert_array_equal(found.depth_at(np.arange(len(clips))), depths[order])
    if weights is not None:
        np.testing.assert_array_equal(found.weights, weights[order])
