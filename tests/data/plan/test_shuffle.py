"""The keyed shuffle: a bijection for every size, unbiased, and stable across versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.plan.shuffle import SMALL, mix, permute, root_key, subkey

# Below and above the size at which sorting gives way to the cipher, squares and their neighbours.
SIZES = [*range(1, 260), 1023, 1024, 1025, 4095, 4096, 4097]

SMALL_GOLDEN = [5, 7, 0, 3, 4, 2, 6, 1]
LARGE_GOLDEN = [665, 890, 426, 197, 512, 562, 347, 923]
KEY_GOLDEN = 0x47B18AD07E065BFD


@pytest.mark.parametrize("seed", [0, 1, 2**32])
def test_every_size_is_a_bijection(seed: int) -> None:
    for size in SIZES:
        order = permute(np.arange(size), size, root_key(seed, "test"))
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9)), min_size=1, max_size=30))
def test_sets_of_many_sizes_are_worked_out_together_as_alone(sets: list[tuple[int, int]]) -> None:
    places = np.concatenate([np.arange(size) for size, _ in sets])
    sizes = np.concatenate([np.full(size, size) for size, _ in sets])
    keys = np.concatenate([np.full(size, number) for size, number in sets]).astype(np.uint64)
    alone = [permute(np.arange(size), size, np.array([number], np.uint64)) for size, number in sets]
    np.testing.assert_array_equal(permute(places, sizes, keys), np.concatenate(alone))


def test_some_places_of_a_hundred_million() -> None:
    places = np.arange(0, 100_000_000, 1_000_003)
    order = permute(places, 100_000_000, root_key(0, "test"))
    assert len(set(order.tolist())) == len(places)
    assert order.min() >= 0
    assert order.max() < 100_000_000
    np.testing.assert_array_equal(permute(places[7:8], 100_000_000, root_key(0, "test")), order[7])


def orders(size: int, number: int) -> np.ndarray:
    """``number`` orders under consecutive subkeys: int64 [number, size]."""
    keys = subkey(root_key(0, "even"), np.arange(number))
    places = np.tile(np.arange(size), number)
    return permute(places, size, np.repeat(keys, size)).reshape(number, size)


def excess(observed: np.ndarray, expected: float) -> float:
    """Chi-square against the uniform distribution, in standard deviations above its mean."""
    freedom = observed.size - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_orders_of_a_few_things_are_equally_frequent(size: int) -> None:
    number = 100 * math.factorial(size)
    codes = (orders(size, number) * size ** np.arange(size)).sum(axis=1)
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == math.factorial(size)
    assert excess(counts, 100) < 4


@pytest.mark.parametrize("size", [16, SMALL - 1, SMALL, 81, 100, 400])
@pytest.mark.parametrize("pair", [(0, 1), (0, -1), (3, 10)])
def test_what_stands_at_two_places_is_independent(size: int, pair: tuple[int, int]) -> None:
    number = 20_000
    keys = subkey(root_key(0, "even"), np.arange(number))
    places = np.tile(np.array(pair) % size, number)
    chosen = permute(places, size, np.repeat(keys, 2)).reshape(number, 2)
    cells = chosen * 8 // size
    sizes = np.bincount(np.arange(size) * 8 // size, minlength=8)
    counts = np.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64).reshape(8, 8)
    expected = (np.outer(sizes, sizes) - np.diag(sizes)) * number / (size * (size - 1))
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert (statistic - 63) / math.sqrt(2 * 63) < 4


def test_half_of_all_orders_are_odd() -> None:
    """A cipher of two odd halves gives even permutations only; 81 is 9 x 9."""
    signs = []
    for order in orders(81, 400):
        cycles, seen = 0, np.zeros(81, bool)
        for start in range(81):
            cycles += not seen[start]
            while not seen[start]:
                seen[start] = True
                start = order[start]
        signs.append((81 - cycles) % 2)
    assert 160 < sum(signs) < 240


def test_keys_of_a_family_differ_and_depend_on_seed_and_name() -> None:
    keys = [
        tuple(subkey(root_key(seed, name), np.arange(100)).tolist())
        for seed in range(3)
        for name in ("positives", "negatives")
    ]
    assert len({key for family in keys for key in family}) == 600


def test_the_shuffle_is_pinned() -> None:
    """Golden values, equal on every machine and in every version. The first output of SplitMix64
    from state 0 is published."""
    assert int(mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert permute(np.arange(8), 8, root_key(7, "golden")).tolist() == SMALL_GOLDEN
    assert permute(np.arange(0, 1000, 125), 1000, root_key(7, "golden")).tolist() == LARGE_GOLDEN
    assert int(subkey(root_key(7, "golden"), 3)[0]) == KEY_GOLDEN
