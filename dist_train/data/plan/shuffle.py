"""A keyed shuffle that can be evaluated at single positions.

It stores nothing and uses no random generator. So a position costs the same in a set of ten as in
one of a hundred million, and results are equal on every machine and in every version.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

#: The increment of SplitMix64: 2^64 over the golden ratio, made odd.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: Sizes below ``SMALL`` are shuffled by sorting: on few values a cipher needs many rounds before
#: all orders are equally likely. With these sizes and rounds no pair of positions shows a bias.
SMALL, ROUNDS = 64, 8
_STATES = GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)
_STRIDE = GOLDEN * np.array([ROUNDS], np.uint64)


def root_key(seed: int, name: str) -> Words:
    """A key for one named use of a seed: uint64 [1]."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.array([int.from_bytes(digest[:8], "little")], np.uint64)


def subkey(key: Words, number: Ints | int) -> Words:
    """A key for each number, such as of a pass: uint64 [n]. The shapes broadcast."""
    # As arrays, because numpy warns when single numbers wrap around.
    return mix(key + GOLDEN * (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)))


def mix(values: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64-bit words."""
    mixed = _mix_high(values.copy())
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _mix_high(values: Words) -> Words:
    """``mix`` in place without the last shift, which the high half does not need."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values


def permute(places: Ints, sizes: Ints | int, keys: Words) -> Ints:
    """The items at ``places`` of a shuffle: for each size and key a bijection of [0, size).

    Args:
        places: int64 [n], each in [0, its size).
        sizes: int64 [n] or one number, each from 1 to 2^40.
        keys: uint64 [n] or [1].
    """
    size, key = np.broadcast_to(sizes, places.shape), np.broadcast_to(keys, places.shape)
    result, small = np.empty(len(places), np.int64), size < SMALL
    for chosen, way in ((small, _permute_small), (~small, _permute_large)):
        if chosen.any():
            result[chosen] = way(places[chosen], size[chosen], key[chosen])
    return result


def _permute_small(places: Ints, size: Ints, key: Words) -> Ints:
    """Sort the members of each set by a hash."""
    sets, first, which = np.unique(subkey(key, size), return_index=True, return_inverse=True)
    members = np.arange(size.max())
    hashes = subkey(sets[:, None], members)
    hashes[members >= size[first, None]] = np.iinfo(np.uint64).max
    order: Ints = np.argsort(hashes, axis=1, kind="stable")[which, places]
    return order


def _permute_large(places: Ints, size: Ints, key: Words) -> Ints:
    """The generalised Feistel cipher of Black & Rogaway 2002 ("Ciphers with arbitrary finite
    domains", section 5).

    A place is left * b + right in a near-square a x b >= size. Each round adds a hash of one half
    to the other half, modulo its range. A result beyond the size is enciphered again until it is
    not. That is rare: a * b exceeds the size by less than a + b.
    """
    # Exact for all sizes below 2^52: the root of a number below a square is below the square's.
    root = np.sqrt(size - 1).astype(np.int64) + 1
    # With odd a and b every round would be an even permutation, and half of all orders impossible.
    root += root % 2
    a, b, end = (array.astype(np.uint64) for array in (root, -(-size // root), size))
    result = _encipher(places.astype(np.uint64), a, b, key)
    beyond = np.flatnonzero(result >= end)
    while len(beyond):
        again = _encipher(result[beyond], a[beyond], b[beyond], key[beyond])
        result[beyond] = again
        beyond = beyond[again >= end[beyond]]
    return result.astype(np.int64)


def _encipher(places: Words, a: Words, b: Words, key: Words) -> Words:
    left, right = np.divmod(places, b)
    for number in range(0, ROUNDS, 2):
        left = _round(left, right, a, key, number)
        right = _round(right, left, b, key, number + 1)
    return left * b + right


def _round(half: Words, other: Words, modulus: Words, key: Words, number: int) -> Words:
    """``half`` plus a hash of ``other``, modulo ``modulus``; all uint64 [n].

    The hot loop of the plan: it works in place and does not divide.
    """
    # The output of SplitMix64, seeded with the key, at one position per half and round.
    hashed = other * _STRIDE
    hashed += key + _STATES[number]
    _mix_high(hashed)
    # The high 32 bits, scaled to [0, modulus).
    hashed >>= np.uint64(32)
    hashed *= modulus
    hashed >>= np.uint64(32)
    hashed += half
    # The sum is below 2 * modulus. If it is below the modulus, the difference wraps around to a
    # greater number, and the minimum keeps the sum.
    return np.minimum(hashed, hashed - modulus, out=hashed)
