"""The arithmetic of the projection, where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scaling_model import (
    BUCKET,
    LARGE,
    SMALL,
    Link,
    buckets,
    doubts,
    expected_slowest,
    fitted,
    link_of,
    project,
)

LINK = Link(latency=1e-4, bandwidth=1e9)


def parts(**more: Any) -> dict[str, Any]:
    """As measured on two ranks over ``LINK``, with nothing hidden and no rank slower."""
    gradients, statistics = 3 * BUCKET, [1000] * 10
    exchange = sum(LINK.all_reduce(size, 2) for size in buckets(gradients))
    return {
        "world": 2,
        "clips": 4,
        "data_s": 0.1,
        "compute_s": 1.0,
        "wait_s": 0.0,
        "samples_s": [1.0, 1.0],
        "statistics_s": sum(LINK.all_reduce(size, 2) for size in statistics),
        "statistics_bytes": statistics,
        "gradients_s": exchange,
        "exchange_s": exchange,
        "gradient_bytes": gradients,
        "rest_s": 0.05,
        "trees": False,
        "all_reduce_s": {"small": LINK.all_reduce(SMALL, 2), "large": LINK.all_reduce(LARGE, 2)},
        **more,
    }


def test_a_ring_sends_each_byte_twice_less_one_share() -> None:
    assert Link(0, 1e9).all_reduce(10**9, 4) == pytest.approx(2 * 3 / 4)
    assert Link(1e-3, 1e30).all_reduce(10**9, 4) == pytest.approx(6e-3)
    assert LINK.all_reduce(10**6, 1) == 0


def test_a_tree_is_taken_where_messages_are_what_costs() -> None:
    trees = Link(1e-3, 1e9, trees=True)
    assert trees.all_reduce(8, 64) == pytest.approx(12e-3, rel=1e-3)
    assert trees.all_reduce(10**9, 4) == pytest.approx(Link(1e-3, 1e9).all_reduce(10**9, 4))
    assert trees.all_reduce(10**9, 1) == 0


@pytest.mark.parametrize("ranks", [2, 5, 8])
@pytest.mark.parametrize("trees", [False, True])
def test_a_link_is_found_again_from_what_it_does(ranks: int, trees: bool) -> None:
    link = Link(1e-5, 1e9, trees)
    times = (link.all_reduce(size, ranks) for size in (SMALL, LARGE))
    found = fitted(*times, ranks, trees=trees)
    assert found.bandwidth == pytest.approx(link.bandwidth, rel=2e-2)
    assert found.latency == pytest.approx(link.latency, rel=2e-2)


@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_the_expected_slowest_is_the_mean_of_many_draws(ranks: int) -> None:
    rng = np.random.default_rng(0)
    samples = rng.gamma(3.0, size=50)
    drawn = rng.choice(samples, (200_000, ranks)).max(1)
    assert expected_slowest(samples.tolist(), ranks) == pytest.approx(drawn.mean(), rel=5e-3)


def test_buckets_hold_all_gradients() -> None:
    assert buckets(2 * BUCKET) == [BUCKET] * 2
    assert buckets(2 * BUCKET + 1) == [BUCKET, BUCKET, 1]
    assert buckets(0) == []


def test_as_many_ranks_as_were_measured_take_what_was_measured() -> None:
    there = project(parts(), LINK, 2)
    own = parts()
    assert there.step == pytest.approx(
        sum(own[f"{p}_s"] for p in ("data", "compute", "statistics", "gradients", "rest")),
        rel=1e-3,
    )


def test_more_ranks_take_the_ring_of_more_and_wait_for_the_slowest() -> None:
    there = project(parts(samples_s=[0.9, 1.1]), LINK, 64)
    exchange = sum(LINK.all_reduce(size, 64) for size in buckets(3 * BUCKET))
    assert there.gradients == pytest.approx(exchange, rel=1e-3)
    assert there.statistics == pytest.approx(10 * LINK.all_reduce(1000, 64), rel=2e-2)
    assert there.wait == pytest.approx(0.1, rel=1e-6)
    assert there.compute == 1.0


def test_what_the_backward_pass_hides_stays_hidden() -> None:
    half = parts(gradients_s=parts()["exchange_s"] / 2)
    there = project(half, LINK, 64)
    assert there.gradients == pytest.approx(there.exchange / 2)
    assert there.without_overlap - there.step == pytest.approx(there.exchange / 2)


def test_a_better_link_is_a_shorter_step() -> None:
    own = parts()
    assert link_of(own).bandwidth == pytest.approx(LINK.bandwidth)
    better = Link(LINK.latency / 10, LINK.bandwidth * 10)
    assert project(own, better, 64).step < project(own, LINK, 64).step


def test_one_rank_exchanges_nothing() -> None:
    there = project(parts(), LINK, 1)
    assert there.step == pytest.approx(0.1 + 1.0 + 0.05)


def test_parts_below_zero_beyond_their_noise_are_not_projected_from() -> None:
    assert doubts(parts()) == []
    within = parts(statistics_s=-0.01, noise_s={"statistics": 0.02})
    assert doubts(within) == []
    assert project(within, LINK, 2).statistics == 0
    beyond = parts(statistics_s=-0.1419, noise_s={"statistics": 0.02})
    (why,) = doubts(beyond)
    assert why == "statistics is -141.9 ms, below zero by more than its noise of 20.0 ms"
    for ranks in (1, 2, 64):
        with pytest.raises(ValueError, match="below zero by more than its noise"):
            project(beyond, LINK, ranks)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"gradients_s": 0.7, "exchange_s": 0.2}, "more than their whole exchange"),
        ({"rest_s": 0.9}, "which no part explains"),
        ({"rest_s": -0.4}, "rest is -400.0 ms"),
        ({"compute_s": float("nan")}, "compute is nan ms"),
    ],
)
def test_parts_that_contradict_each_other_are_not_projected_from(
    more: dict[str, float], why: str
) -> None:
    assert any(why in doubt for doubt in doubts(parts(**more)))
