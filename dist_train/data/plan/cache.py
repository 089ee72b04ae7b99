"""The clips of a large set, sorted by depth once and mapped from files ever after.

Sorting a hundred million clips takes a while, and the plan needs nothing else of them. So one
process of a node sorts them, and all others wait for it and then share the same pages of memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.shuffle import Ints, mix
from dist_train.errors import PlanError
from dist_train.files import new_file, open_lock, sync_folder, write_whole

#: Of the files' form. Others are not read, but made anew.
VERSION = 1
#: Clips that are looked at together: this bounds the memory, to some 200 MB.
PIECE = 1 << 21
#: Clips of one depth are sorted in so many lots, by the first bits of their hash.
LOT_BITS = 6

#: 1 for a positive, 0 for a negative, anything else for a clip that takes no part; or depths.
Column = np.ndarray[Any, np.dtype[Any]]
NAMES = ("negatives", "positives")
#: Folders that were made here.
SORTED = re.compile(r"sorted\.[0-9a-f]{8}")


def sorted_classes(
    folder: Path, identity: str, read: Callable[[], tuple[Column, Column]]
) -> tuple[ByDepth, ByDepth]:
    """The (positives, negatives) of a set, as ``folder`` holds them, or else sorted into it.

    Any number of processes may ask at once: one sorts while the others wait. What it writes counts
    when it is complete and synced; a process that is killed leaves nothing that is used.

    Args:
        identity: names the set, as by the fingerprint of the store and the selection. Files of
            another one are replaced.
        read: gives (depths, labels) of all clips, two integer arrays [clips], which may be mapped
            from files. It is called only if the set has to be sorted. Clip i has ``depths[i]``
            frames; it is a positive where ``labels[i]`` is 1, a negative where it is 0, and takes
            no part otherwise.

    Raises:
        PlanError: the arrays are not of one length of at most 2^32, or a depth is below 1.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not _holds(folder, identity):
            _sort_into(folder, identity, *read())
        facts = _facts(folder)
        negatives, positives = (
            _open(folder / facts["files"] / f"{name}.u32", facts[name]) for name in NAMES
        )
    return positives, negatives


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; the system releases that of a killed process."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    return facts


def _holds(folder: Path, identity: str) -> bool:
    if not (folder / "classes.json").exists():
        return False
    facts = _facts(folder)
    return bool(facts["version"] == VERSION and facts["identity"] == identity)


def _open(path: Path, facts: dict[str, Any]) -> ByDepth:
    # An empty file cannot be mapped. A plain view of the mapping is quicker to index than a memmap.
    clips = np.asarray(np.memmap(path, "<u4", "r")) if path.stat().st_size else np.zeros(0, "<u4")
    depths, starts = (np.array(facts[name], np.int64) for name in ("depths", "starts"))
    return ByDepth(clips, depths, starts, facts["digest"])


def _sort_into(folder: Path, identity: str, depths: Column, labels: Column) -> None:
    if depths.shape != labels.shape or depths.ndim != 1 or len(depths) > 1 << 32:
        raise PlanError("depths and labels are not one number for each of at most 2^32 clips")
    # Another set, and what a process that was killed has left. Whoever has files mapped keeps them.
    (folder / "classes.json").unlink(missing_ok=True)
    for old in folder.glob("sorted.*"):
        if SORTED.fullmatch(old.name) and not old.is_symlink():
            shutil.rmtree(old)
    files = folder / f"sorted.{secrets.token_hex(4)}"
    files.mkdir()
    facts: dict[str, Any] = {"version": VERSION, "identity": identity, "files": files.name}
    for label, name in enumerate(NAMES):
        facts[name] = _sort_class(files / f"{name}.u32", depths, labels, label)
    sync_folder(files)
    write_whole(folder / "classes.json", json.dumps(facts))


def _sort_class(path: Path, depths: Column, labels: Column, label: int) -> dict[str, Any]:
    """Write the clips of one class by (depth, hash), as ``depth_order`` has them: a counting sort
    by depth and the first bits of the hash, and then each of these lots by the whole hash."""
    counts = np.zeros(0, np.int64)
    for _, keys in _pieces(depths, labels, label):
        more = np.bincount(keys, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    with new_file(path) as file:
        os.truncate(file.fileno(), 4 * total)
    if total == 0:
        empty = ByDepth(np.zeros(0, "<u4"), np.zeros(0, np.int64), np.zeros(1, np.int64))
        return {"depths": [], "starts": [0], "digest": empty.digest}

    clips = np.memmap(path, "<u4", "r+")
    free = ends - counts
    for numbers, keys in _pieces(depths, labels, label):
        order = np.argsort(keys)
        keys = keys[order]
        mine = np.bincount(keys, minlength=len(counts))
        place_in_lot = np.arange(len(keys)) - (np.cumsum(mine) - mine)[keys]
        clips[free[keys] + place_in_lot] = numbers[order]
        free += mine
    for lot in np.flatnonzero(counts).tolist():
        part = clips[ends[lot] - counts[lot] : ends[lot]]
        part[:] = part[np.argsort(mix(part.astype(np.uint64)))]
    clips.flush()

    counts = np.append(counts, np.zeros(-len(counts) % (1 << LOT_BITS), np.int64))
    by_depth = counts.reshape(-1, 1 << LOT_BITS).sum(1)
    found = np.flatnonzero(by_depth)
    starts = np.append(0, np.cumsum(by_depth[found]))
    digest = ByDepth(np.asarray(clips), found, starts).digest
    return {"depths": found.tolist(), "starts": starts.tolist(), "digest": digest}


def _pieces(depths: Column, labels: Column, label: int) -> Iterator[tuple[Ints, Ints]]:
    """Clip numbers of a class, and depth and first bits of the hash in one number."""
    for first in range(0, len(depths), PIECE):
        numbers = first + np.flatnonzero(labels[first : first + PIECE] == label)
        depth = depths[numbers].astype(np.int64)
        if len(depth) and depth.min() < 1:
            raise PlanError("a clip is less than one frame deep", where=numbers[depth.argmin()])
        lot = mix(numbers.astype(np.uint64)) >> np.uint64(64 - LOT_BITS)
        yield numbers, (depth << LOT_BITS) + lot.astype(np.int64)
