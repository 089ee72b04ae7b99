"""Mending of a store: what is bad is written again, and nothing is given up before that is there.

The good clips of a bad shard are taken from it, the others from their raw files. A clip that cannot
be had becomes a reject whose reason says so, and comes back by a later repair with its raw file.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_train.data.raw.source import Source
from dist_train.data.store.build import by_class, finish, gather_rejects, source_again, write_shards
from dist_train.data.store.build_spec import (
    LOST,
    SCRATCH,
    Job,
    clear_scratch,
    lost_of,
    read_job,
    read_reject_list,
    read_rejects,
    writing,
)
from dist_train.data.store.index import digest_of, look_up
from dist_train.data.store.reader import MARKER, REJECTED, SHARDS
from dist_train.data.store.salvage import good_clips, same
from dist_train.data.store.shard_task import Task
from dist_train.data.store.shards import Shard, read_records
from dist_train.data.store.verify import Check, Fault, check_shard, marker_of_store, sound_index
from dist_train.data.types import Record, Volume
from dist_train.errors import FileError, StoreError
from dist_train.files import check_replaceable, sync_folder
from dist_train.progress import Progress

log = logging.getLogger(__name__)
Files = Source | Sequence[Volume]
# The checksum at the end of the reason of a lost clip.
_SUM = re.compile(r"\(crc32c ([0-9a-f]{8})\)$")


def repair(
    folder: Path,
    source: Path | str | None,
    faults: Sequence[Fault],
    *,
    salvage: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the bad shards among ``faults`` again, and the index and summaries from all shards.

    New shards are written aside, and take the place of the old ones once all of them are known to
    hold what was lost; until then the store is not changed. Files that do not belong to the store
    are left alone.

    Args:
        source: the folder or URL of the raw files, or the MedMNIST file, that it was made from. It
            is opened only if a clip is needed from it. Clips of ``lost_files`` come back too. None:
            there is none.
        salvage: a bad clip whose file is not there becomes a reject, with the reason ``LOST``.
            Without it that is an error.

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: ``source`` does not hold what the store was made from, or not all of it; no clip
            would be left; or another process is writing the store. The store is as it was.
    """
    job = read_job(folder)
    shards = job.shards(folder)
    bad = {fault.shard for fault in faults if fault.shard is not None}
    index = sound_index(folder)
    with writing(folder, job), _scratch_folder(folder) as scratch:
        numbers = set(bad)
        if source is not None:
            numbers |= {shard.number for shard in shards if lost_of(shard)}
        plans = {n: _Mending.of(job, shards[n], index) for n in sorted(numbers)}
        files: Files = []
        if any(plan.needed for plan in plans.values()):
            if source is not None:
                files = _opened(job, source)
            plans = _with_what_is_there(files, source, plans, bad, salvage=salvage)
        _write_aside(job, plans, scratch, files, workers, progress)
        _check_any_left(job, shards, plans, scratch)
        difference = _difference(folder, job, plans, scratch, index)
        if difference is not None:
            raise StoreError(
                f"does not hold the files that the store was made from ({difference}); "
                "the store is as it was",
                where=source,
                fix="Name the right folder, or prepare the store anew in another one.",
            )
        for number in plans:
            check_replaceable(shards[number].path)
            check_replaceable(shards[number].rejects_path)
        if plans:
            # The index may not be that of the new shards. What ``finish`` needs is all there.
            (folder / MARKER).unlink(missing_ok=True)
        for number in plans:
            _put_in_place(Shard(number, scratch), shards[number])
        return finish(folder, job, shards, max_rejected=1.0, anew=True)


def lost_files(folder: Path) -> list[str]:
    """Raw files whose clips were lost to damage, and can be had again by ``repair``.

    Raises:
        StoreError: there is no store, or what tells of it is damaged.
    """
    return [name for shard in read_job(folder).shards(folder) for name in lost_of(shard)]


@dataclass(frozen=True)
class _Mending:
    """How a shard is written again, by the positions of its rows.

    ``kept``: good clips of the old shard. ``before``: reasons of its rejects, as far as known.
    ``sums``: CRC-32C of the pixels of rows that are not kept, as far as known. ``needed``: rows
    whose raw file is to be decoded. ``lost``: rows that are given up.
    """

    old: Shard
    rows: Sequence[Record]
    kept: Mapping[int, Record]
    before: Mapping[int, str]
    sums: Mapping[int, int]
    needed: frozenset[int]
    lost: frozenset[int] = frozenset()

    @classmethod
    def of(cls, job: Job, old: Shard, index: Path | None) -> _Mending:
        rows = job.rows(old)
        known = None if index is None else look_up(index, [row["key"] for row in rows])
        kept = good_clips(old.path, rows, known)
        reasons = _known_reasons(old)
        before, sums = {}, {}
        for position in sorted(set(range(len(rows))) - kept.keys()):
            row = rows[position]
            reason = reasons.get(row["filename"])
            told = _SUM.search(reason or "")
            if known is not None and row["key"] in known:
                sums[position] = known[row["key"]]["crc32c"]
            elif reason is not None:
                before[position] = reason
                if told:
                    sums[position] = int(told[1], 16)
        return cls(old, rows, kept, before, sums, frozenset(range(len(rows))) - kept.keys())

    def was_lost(self, position: int) -> bool:
        """Whether it was a clip once, and is none in the store as it is."""
        return self.before.get(position, "").startswith(LOST)

    def names(self, positions: Set[int]) -> list[str]:
        return [self.rows[position]["filename"] for position in sorted(positions)]

    def without(self, absent: Set[str]) -> _Mending:
        """The same, where these files cannot be had."""
        gone = {p for p in self.needed if self.rows[p]["filename"] in absent}
        lost = frozenset(p for p in gone if p not in self.before or self.was_lost(p))
        return replace(self, needed=self.needed - gone, lost=lost)

    def amended(self, task: Task) -> Task:
        unread = frozenset(range(len(self.rows))) - self.kept.keys() - self.needed
        settled = {position: self._reason(position) for position in unread}
        return replace(task, old=self.old.path, kept=self.kept, settled=settled)

    def _reason(self, position: int) -> str:
        if position not in self.lost:
            return self.before[position]
        known = f" (crc32c {self.sums[position]:08x})" if position in self.sums else ""
        return LOST + known


def _known_reasons(shard: Shard) -> dict[str, str]:
    """Why files gave no clip, by the shard's list, or the store's where that is damaged."""
    for path in (shard.rejects_path, shard.folder.parent / REJECTED):
        try:
            rejects = read_reject_list(path)
        except FileError:
            continue
        return dict(zip(rejects["file"], rejects["reason"], strict=True))
    return {}


def _opened(job: Job, source: Path | str) -> Files:
    try:
        return source_again(job, source)
    except StoreError as error:
        raise StoreError(
            error.what,
            where=error.where,
            fix=f"{error.fix or 'Name the right one.'} If it is gone, --salvage without --repair "
            "keeps the good clips.",
        ) from None


def _with_what_is_there(
    files: Files,
    source: Path | str | None,
    plans: Mapping[int, _Mending],
    bad: Set[int],
    *,
    salvage: bool,
) -> dict[int, _Mending]:
    """The plans without the files that are missing; all are, where there is no source.

    Raises:
        StoreError: clips would be lost, and ``salvage`` was not asked for.
    """
    absent = {name for plan in plans.values() for name in plan.names(plan.needed)}
    if source is not None:
        absent = set(files.missing(sorted(absent))) if isinstance(files, Source) else set()
    found = {number: plan.without(absent) for number, plan in plans.items()}
    # A shard that was only to get back lost clips stays as it is where none of them is there.
    found = {
        number: plan
        for number, plan in found.items()
        if number in bad or any(map(plan.was_lost, plan.needed))
    }
    newly = [
        name
        for plan in found.values()
        for name in plan.names({p for p in plan.lost if not plan.was_lost(p)})
    ]
    if newly and not salvage:
        raise StoreError(
            f"the raw files of {len(newly)} damaged clips are missing; the first: {newly[0]}",
            where=source,
            fix="Give the folder that has them, or add --salvage: then the good clips of their "
            "shards are kept, and the damaged ones become rejects.",
        )
    return found


def _write_aside(
    job: Job,
    plans: Mapping[int, _Mending],
    scratch: Path,
    files: Files,
    workers: int | None,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(len(plan.rows) for plan in plans.values())
    aside = [Shard(number, scratch) for number in plans]

    def amend(task: Task) -> Task:
        return plans[task.shard.number].amended(task)

    for count in write_shards(job, aside, files, workers=workers, amend=amend):
        done += count
        if progress:
            progress(done, total)


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder among the shards, so on their disk, which is removed at the end."""
    scratch = folder / SHARDS / f"{SCRATCH}{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        clear_scratch(scratch)


def _put_in_place(new: Shard, old: Shard) -> None:
    # In this order, a kill leaves a shard without a list, which counts as not written.
    old.rejects_path.unlink(missing_ok=True)
    new.path.replace(old.path)
    new.rejects_path.replace(old.rejects_path)
    sync_folder(old.folder)


def _check_any_left(
    job: Job, shards: Sequence[Shard], plans: Mapping[int, _Mending], scratch: Path
) -> None:
    written = (Shard(n, scratch) if n in plans else shard for n, shard in enumerate(shards))
    if all(job.clips(shard) == len(read_rejects(shard)) for shard in written):
        raise StoreError(
            "no clip of the store is good; it is left as it was",
            where=scratch.parents[1],
            fix="Run 'dist-train verify' with --repair and the folder of raw files.",
        )


def _difference(
    folder: Path,
    job: Job,
    plans: Mapping[int, _Mending],
    scratch: Path,
    index: Path | None,
) -> str | None:
    """In what the new shards are not those that were lost, as far as the rest can tell."""
    for number, plan in plans.items():
        shard = Shard(number, scratch)
        _, faults = check_shard(Check(shard, plan.rows, None))
        if faults:
            return str(faults[0])
        new = dict(read_records(shard.path))
        keys = [row["key"] for row in plan.rows]
        known = {} if index is None else look_up(index, keys)
        for position, key in enumerate(keys):
            if key in known:
                if key not in new and position not in plan.lost:
                    return f"clip '{key}' is missing"
                if key in new and not same(new[key], known[key]):
                    return f"clip '{key}': its record is not that of the index"
            elif key in new and index is not None and not plan.was_lost(position):
                return f"clip '{key}' was a reject, and is none now"
            if key in new and plan.sums.get(position, new[key]["crc32c"]) != new[key]["crc32c"]:
                return f"clip '{key}': its pixels are not those that were lost"
    return None if index is not None else _difference_of_all(folder, job, plans, scratch)


def _difference_of_all(
    folder: Path, job: Job, plans: Mapping[int, _Mending], scratch: Path
) -> str | None:
    """The same without an index: by the marker's counts of rejects, and its digest of the content.

    There is a warning where nothing tells what the pixels of a clip were.
    """
    marker = marker_of_store(folder)
    old = job.shards(folder)
    written = [Shard(s.number, scratch) if s.number in plans else s for s in old]
    if marker is not None:
        # Clips that were lost are none on both sides.
        before = Counter(marker["rejected"])
        for shard in old:
            labels = {row["filename"]: str(row["label"]) for row in job.rows(shard)}
            before.subtract(labels[name] for name in lost_of(shard) if name in labels)
        rejects = gather_rejects(written)
        after = Counter(rejects["class"][~rejects["reason"].str.startswith(LOST)])
        if +before != after:
            now, then = by_class(after), by_class(+before)
            return f"rejected are: {now or 'none'}; they were: {then or 'none'}"
    unknown = [
        name
        for plan in plans.values()
        for name in plan.names(plan.needed - plan.sums.keys() - plan.before.keys())
    ]
    content = None if marker is None else marker.get("content")
    gone = any(not plan.was_lost(p) for plan in plans.values() for p in plan.lost)
    if unknown and (content is None or gone):
        log.warning(
            "nothing in the store tells whether the raw files of %d damaged clips are those that "
            "it was made from; the first: %s",
            len(unknown),
            unknown[0],
        )
    elif unknown:
        # Clips that come back were none when the marker was written.
        back = {
            plan.rows[p]["key"] for plan in plans.values() for p in plan.before if plan.was_lost(p)
        }
        records = [(key, r) for s in written for key, r in read_records(s.path) if key not in back]
        records.sort(key=lambda entry: entry[0].encode())
        if digest_of(records) != content:
            return f"the pixels of some of {len(unknown)} clips are others, as {unknown[0]}"
    return None
