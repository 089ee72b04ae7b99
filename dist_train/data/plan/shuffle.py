"""A keyed shuffle that is worked out place by place: which of ``size`` things stands at a place.

Nothing is stored and no random generator is used, so one place costs the same in a set of ten and
in one of a hundred million, and the answer is the same on every machine and in every version.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

#: The increment of SplitMix64: 2^64 over the golden ratio, made odd.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: Sizes below this are shuffled by sorting: where a half has few values to hash, a cipher needs
#: many rounds before all orders are alike. With these sizes and rounds no pair of places tells.
SMALL, ROUNDS = 64, 8
_STATES = GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)
_STRIDE = GOLDEN * np.array([ROUNDS], np.uint64)


def root_key(seed: int, name: str) -> Words:
    """The key of one use of a seed: uint64 [1]."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.array([int.from_bytes(digest[:8], "little")], np.uint64)


def subkey(key: Words, number: Ints | int) -> Words:
    """A key for each number of a family, as of the passes over a set: uint64 [n]; the shapes
    broadcast."""
    # Arrays wrap around where single numbers warn.
    return mix(key + GOLDEN * (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)))


def mix(values: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64-bit words."""
    mixed = _mix_high(values.copy())
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _mix_high(values: Words) -> Words:
    """``mix`` in place, but for the last shift, which the high half does well without."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values


def below(key: Words, size: int) -> int:
    """A number from 0 to ``size`` - 1, for a key of shape [1]."""
    return int(key[0]) % size


def permute(places: Ints, sizes: Ints | int, keys: Words) -> Ints:
    """What stands at ``places``: for each size and key a bijection of [0, size).

    Args:
        places: int64 [n], each in [0, its size).
        sizes: int64 [n] or one number, each from 1 to 2^40.
        keys: uint64 [n] or [1].

    Returns:
        int64 [n].
    """
    size, key = np.broadcast_to(sizes, places.shape), np.broadcast_to(keys, places.shape)
    small = size < SMALL
    if not small.any():
        return _permute_large(places, size, key)
    if small.all():
        return _permute_small(places, size, key)
    result = np.empty(len(places), np.int64)
    for chosen, way in ((small, _permute_small), (~small, _permute_large)):
        result[chosen] = way(places[chosen], size[chosen], key[chosen])
    return result


def _permute_small(places: Ints, size: Ints, key: Words) -> Ints:
    """Each set sorted by a hash of its members."""
    sets, first, which = np.unique(subkey(key, size), return_index=True, return_inverse=True)
    members = np.arange(size.max())
    hashes = subkey(sets[:, None], members)
    hashes[members >= size[first, None]] = np.iinfo(np.uint64).max
    order: Ints = np.argsort(hashes, axis=1, kind="stable")[which, places]
    return order


def _permute_large(places: Ints, size: Ints, key: Words) -> Ints:
    """The generalised Feistel cipher of Black & Rogaway 2002 ("Ciphers with arbitrary finite
    domains", section 5).

    A place is left * b + right, in a near-square a x b that holds the size. Each round adds to one
    half, modulo its range, a hash of the other. Where the result lies beyond the size, it is
    enciphered again until it does not. That is rare: a * b exceeds the size by less than a + b.
    """
    # Exact for all sizes below 2^52: the root of a number below a square is below its root.
    root = np.sqrt(size - 1).astype(np.int64) + 1
    # With a and b odd, every round would be an even permutation: half of all orders out of reach.
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
    """``half`` plus a hash of the other half, modulo ``modulus``; all uint64 [n].

    This is where the time goes: hence the work in place, and no division.
    """
    # The state of SplitMix64 that started from the key, at an output for each half and round.
    hashed = other * _STRIDE
    hashed += key + _STATES[number]
    _mix_high(hashed)
    # 32 bits of it, scaled to [0, modulus).
    hashed >>= np.uint64(32)
    hashed *= modulus
    hashed >>= np.uint64(32)
    hashed += half
    # What is below the modulus wraps around to a greater number when it is taken off.
    return np.minimum(hashed, hashed - modulus, out=hashed)
