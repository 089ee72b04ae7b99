"""Clips that show nearly the same: one re-encoded, dimmed, cut by a frame, or stored twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dist_train.data.check.statistics import Clip, grey_of, mean_pictures

#: Bits of a hash, of 192, that may differ between two clips to be compared further.
MOST_BITS = 16
#: Correlation of the mean pictures of two near copies, at least.
LEAST_CORRELATION = 0.98
#: Of two near copies the depth of the deeper one, relative to the other.
MOST_DEPTH = 1.1
#: Most pairs that are returned; those with the most equal hashes are.
MOST_PAIRS = 200_000
# Pairs are gathered up to this number; clips that agree in so many bands are not compared.
_MOST_GATHERED = 20 * MOST_PAIRS
_CROWD = 200
_DEEPEST = 4
_SIDE = 32

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def similar_hashes(hashes: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[Numbers, bool]:
    """Pairs of rows that differ in ``MOST_BITS`` bits at most.

    Only rows that agree in a band of 16 bits are compared (locality-sensitive hashing, Indyk and
    Motwani 1998), so time grows with the number of rows, not its square. Of 12 bands, rows that
    differ in 11 bits share one for certain. Where more than ``_CROWD`` rows share a band, they must
    share the next one, too.

    Args:
        hashes: uint8 [N, bytes].

    Returns:
        Pairs of row numbers, int64 [K, 2], the most similar first; and whether there were more.
    """
    bands = np.ascontiguousarray(hashes).view(np.uint16)
    found: list[np.ndarray[Any, Any]] = [np.empty((0, 3), np.int64)]
    gathered, is_cut = 0, False
    for band in range(bands.shape[1]):
        for members in _sharing(bands, np.arange(len(bands)), band):
            found.append(_close(hashes, members))
            gathered += len(found[-1])
        if gathered > _MOST_GATHERED:
            is_cut = True
            break
    # Rows are (bits, a, b): sorted, and without repeats.
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:MOST_PAIRS, 1:], is_cut or len(pairs) > MOST_PAIRS


def _sharing(
    bands: np.ndarray[Any, np.dtype[np.uint16]], members: Numbers, band: int, depth: int = 1
) -> Iterator[Numbers]:
    """Sets of rows that agree in a band, and in more bands if they are too many."""
    values = bands[members, band % bands.shape[1]]
    order = np.argsort(values, kind="stable")
    for same in np.split(members[order], np.flatnonzero(np.diff(values[order])) + 1):
        if 1 < len(same) <= _CROWD:
            yield same
        elif len(same) > _CROWD and depth < _DEEPEST:
            yield from _sharing(bands, same, band + 1, depth + 1)


def _close(hashes: np.ndarray[Any, np.dtype[np.uint8]], members: Numbers) -> Numbers:
    own = hashes[members]
    differ = np.bitwise_count(own[:, None] ^ own[None]).sum(axis=2, dtype=np.int64)
    a, b = np.nonzero(np.triu(differ <= MOST_BITS, k=1))
    pairs = np.sort(np.stack([members[a], members[b]], axis=1), axis=1)
    return np.column_stack([differ[a, b], pairs])


def summary_of(clip: Clip) -> tuple[int, np.ndarray[Any, np.dtype[np.float32]]]:
    """Depth, and the mean pictures in one row, as ``are_near_copies`` compares them."""
    return len(clip), mean_pictures(grey_of(clip), _SIDE, _SIDE).ravel()


def are_near_copies(
    one: tuple[int, np.ndarray[Any, Any]], other: tuple[int, np.ndarray[Any, Any]]
) -> bool:
    """Whether two clips, by their ``summary_of``, have like depths and nearly the same pictures."""
    shallow, deep = sorted((one[0], other[0]))
    if deep > MOST_DEPTH * shallow + 1:
        return False
    return bool(np.corrcoef(one[1], other[1])[0, 1] >= LEAST_CORRELATION)
