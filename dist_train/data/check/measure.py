"""Read a store's pixels in several processes, for statistics of clips and pairs of near copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import cv2
import numpy as np
import pandas as pd

from dist_train.config import CacheSettings
from dist_train.data.check.near_copies import are_near_copies, similar_hashes, summary_of
from dist_train.data.check.statistics import ClipStatistics, statistics_of
from dist_train.data.store.reader import Store
from dist_train.errors import StoreError
from dist_train.places import Location
from dist_train.progress import Progress
from dist_train.system.supervised_pool import each_done

_BATCH = 64

#: Pairs of clip numbers.
Pairs = list[tuple[int, int]]
#: The folder or URL of a store, the checksum of its index, and the cache's settings as JSON.
Place = tuple[Location, int, str]
T = TypeVar("T")


def measure(
    store: Store,
    numbers: Sequence[int],
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Take the statistics of clips.

    Args:
        numbers: of the clips; best in the order of the disk.

    Returns:
        The fields of ``ClipStatistics``, by clip number; and the errors of clips that cannot be
        read.
    """
    measured: dict[int, ClipStatistics] = {}
    unreadable: list[str] = []
    tasks = ((_place_of(store), part) for part in _parts(numbers))
    for part in each_done(_statistics, tasks, workers):
        for number, found in part:
            if isinstance(found, str):
                unreadable.append(found)
            else:
                measured[number] = found
        if progress:
            progress(len(measured) + len(unreadable), len(numbers))
    fields = list(ClipStatistics.__dataclass_fields__)
    table = pd.DataFrame.from_dict(measured, orient="index", columns=fields)
    return table.sort_index(), sorted(unreadable)


def near_copies(
    store: Store,
    hashes: pd.Series,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Pairs, bool]:
    """Find pairs of clips that are near copies.

    Args:
        hashes: ``perceptual_hash`` by clip number; None for clips to leave out.

    Returns:
        The pairs, in order; and whether only the most similar pairs were compared.
    """
    hashes = hashes.dropna()
    if len(hashes) < 2:
        return [], False
    rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
    pairs, is_cut = similar_hashes(rows)
    numbers = sorted(map(tuple, hashes.index.to_numpy()[pairs].tolist()))
    tasks = ((_place_of(store), part) for part in _parts(numbers))
    found: Pairs = []
    for done, confirmed in enumerate(each_done(_confirmed, tasks, workers), 1):
        found += confirmed
        if progress:
            progress(min(done * _BATCH, len(numbers)), len(numbers), "pairs compared")
    return sorted(found), is_cut


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[first : first + _BATCH] for first in range(0, len(items), _BATCH))


def _place_of(store: Store) -> Place:
    return store.place, int(store.info["index_crc32c"]), store.cache.model_dump_json()


@lru_cache(maxsize=1)
def _opened(place: Place) -> Store:
    """The store, opened once in each process. The checksum tells it from a later one."""
    cv2.setNumThreads(1)
    return Store(place[0], CacheSettings.model_validate_json(place[2]))


def _statistics(task: tuple[Place, Sequence[int]]) -> list[tuple[int, ClipStatistics | str]]:
    store = _opened(task[0])
    results: list[tuple[int, ClipStatistics | str]] = []
    store.prefetch(task[1])
    for number in task[1]:
        try:
            results.append((number, statistics_of(store.read(number))))
        except StoreError as error:
            results.append((number, str(error)))
    return results


def _confirmed(task: tuple[Place, Sequence[tuple[int, int]]]) -> Pairs:
    place, pairs = task
    _opened(place).prefetch(sorted({number for pair in pairs for number in pair}))
    return [(a, b) for a, b in pairs if are_near_copies(_summary(place, a), _summary(place, b))]


@lru_cache(maxsize=4096)
def _summary(place: Place, number: int) -> tuple[int, np.ndarray[Any, Any]]:
    """A clip that is like many others is read once; 12 KiB each are kept."""
    return summary_of(_opened(place).read(number))
