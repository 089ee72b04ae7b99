"""Repair of a store. For each row of a damaged shard:

1. a good clip of the old shard is kept;
2. else its raw file is decoded again;
3. else, with ``salvage``, it becomes a reject that is marked ``LOST``. A later repair that has the
   raw file brings the clip back.

New shards are written aside, and replace the old ones only when they are known to hold the same
clips.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_train.data.raw.source import Source
from dist_train.data.store.build import raw_of, reopen_source, write_tasks
from dist_train.data.store.build_spec import Job, read_job
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.finish import finish
from dist_train.data.store.index import digest_of, look_up
from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS
from dist_train.data.store.rejects import LOST, gather_rejects, lost_in, read_rejects
from dist_train.data.store.salvage import good_clips
from dist_train.data.store.shard_task import RawClips, Task
from dist_train.data.store.shards import Form, Shard, read_records, without_place
from dist_train.data.store.verify import Fault, check_shard, sound_index, valid_marker
from dist_train.data.store.write_lock import SCRATCH, write_lock
from dist_train.data.types import Record
from dist_train.errors import StoreError
from dist_train.files import check_replaceable, sync_folder
from dist_train.progress import Progress
from dist_train.system.supervised_pool import supervised

log = logging.getLogger(__name__)
# The checksum at the end of the reason of a lost clip.
_CRC = re.compile(r"\(crc32c ([0-9a-f]{8})\)$")


def repair(
    folder: Path,
    source: Path | str | None,
    faults: Sequence[Fault],
    *,
    salvage: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rewrite the bad shards among ``faults``, and the index and summaries from all shards.

    Clips of ``lost_files`` come back too. Files that do not belong to the store are left alone.

    Args:
        source: the folder or URL of the raw files, or the MedMNIST file, that the store was made
            from; None if it is gone. It is opened only if a clip is needed from it.
        salvage: a bad clip whose raw file is missing becomes a reject. Without it that is an error.

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: ``source`` does not hold what the store was made from, or not all of it; no clip
            would be left; or another process is writing the store. The store is unchanged.
    """
    job = read_job(folder)
    shards = job.shards(folder)
    bad = {fault.shard for fault in faults if fault.shard is not None}
    with (
        write_lock(folder, job),
        TemporaryDirectory(prefix=SCRATCH, dir=folder / SHARDS) as scratch,
    ):
        marker = valid_marker(folder)
        index = sound_index(folder, marker)
        numbers = set(bad)
        if source is not None:
            numbers |= {shard.number for shard in shards if lost_in(shard)}
        damaged = [_Damaged.of(job, shards[n], index, Path(scratch)) for n in sorted(numbers)]
        raw, absent = _open_raw(job, source, damaged)
        lost = [name for d in damaged for name in d.give_up(absent)]
        if lost and not salvage:
            raise StoreError(
                f"the raw files of {len(lost)} damaged clips are missing; the first: {lost[0]}",
                where=source,
                fix="Give the folder that has them, or add --salvage: then the good clips of their "
                "shards are kept, and the damaged ones become rejects.",
            )
        # A shard that only lacks lost clips stays as it is, if none of their files is found.
        damaged = [d for d in damaged if d.old.number in bad or d.wanted]
        tasks = [d.task(job, raw) for d in damaged]
        total = sum(len(task.rows) for task in tasks)
        write_tasks(tasks, job, raw, partial(supervised, workers=workers), progress, 0, total)
        new = {d.new.number: d.new for d in damaged}
        written = [new.get(shard.number, shard) for shard in shards]
        if len(gather_rejects(written)) == len(job.table):
            raise StoreError(
                "no clip of the store is good; it is left as it was",
                where=folder,
                fix="Run 'dist-train verify' with --repair and the folder of raw files.",
            )
        content = None if marker is None or lost else marker.get("content")
        difference = _difference(damaged, written, content)
        if difference is not None:
            raise StoreError(
                f"does not hold the files that the store was made from ({difference}); "
                "the store is as it was",
                where=source,
                fix="Name the right folder, or prepare the store anew in another one.",
            )
        replaced = [path for d in damaged for path in (d.old.path, d.old.rejects_path)]
        for path in (*replaced, *(folder / n for n in (INDEX, TABLE, REJECTED, MARKER))):
            check_replaceable(path)
        # From here on, ``finish`` needs nothing but the shards.
        (folder / MARKER).unlink(missing_ok=True)
        for d in damaged:
            # A kill leaves a shard without a list, which counts as not written.
            d.old.rejects_path.unlink(missing_ok=True)
            d.new.path.replace(d.old.path)
            d.new.rejects_path.replace(d.old.rejects_path)
            sync_folder(folder / SHARDS)
        return finish(folder, job, shards, max_rejected=1.0)


def lost_files(folder: Path) -> list[str]:
    """Raw files whose clips were lost to damage. ``repair`` brings them back.

    Raises:
        StoreError: there is no store, or its ``job.json`` or ``manifest.csv`` is damaged.
    """
    return [name for shard in read_job(folder).shards(folder) for name in lost_in(shard)]


@dataclass(frozen=True)
class _Damaged:
    """A shard to rewrite. What is known of its rows is by their positions.

    Attributes:
        kept: records of good clips.
        rejected: reasons of rows that give no clip.
        wanted: rows whose raw files are needed, and the known entries of their records; None if
            they were clips of which nothing is known.
        was_lost: those of ``wanted`` that are marked ``LOST`` in the store.
        form: of the store's clips.
    """

    old: Shard
    new: Shard
    rows: Sequence[Record]
    kept: dict[int, Record]
    rejected: dict[int, str]
    wanted: dict[int, Record | None]
    was_lost: set[int]
    form: Form

    @classmethod
    def of(cls, job: Job, old: Shard, index: Path | None, scratch: Path) -> _Damaged:
        rows = job.rows(old)
        known = None if index is None else look_up(index, [row["key"] for row in rows])
        reasons = _known_reasons(old)
        kept = good_clips(old.path, rows, job.form, known)
        found = cls(old, Shard(old.number, scratch), rows, kept, {}, {}, set(), job.form)
        for position, row in enumerate(rows):
            reason = reasons.get(row["filename"], "")
            if position in kept:
                continue
            if known is not None and row["key"] in known:
                found.wanted[position] = without_place(known[row["key"]])
            elif reason.startswith(LOST):
                crc = _CRC.search(reason)
                found.wanted[position] = {"crc32c": int(crc[1], 16)} if crc else {}
                found.was_lost.add(position)
            elif reason or known is not None:
                found.rejected[position] = reason or "rejected before; the reason was damaged"
            else:
                found.wanted[position] = None
        return found

    def give_up(self, absent: Set[str]) -> list[str]:
        """Mark wanted rows without a raw file as ``LOST``; returns the files that were not yet."""
        names = []
        for position, record in list(self.wanted.items()):
            name = self.rows[position]["filename"]
            if name in absent:
                del self.wanted[position]
                crc = f" (crc32c {record['crc32c']:08x})" if record else ""
                self.rejected[position] = LOST + crc
                if position not in self.was_lost:
                    names.append(name)
        return names

    def task(self, job: Job, raw: RawClips) -> Task:
        raw, settings = raw_of(raw, job, self.old), job.settings
        return Task(self.new, self.rows, settings, raw, self.old.path, self.kept, self.rejected)


def _known_reasons(shard: Shard) -> dict[str, str]:
    """Reasons of rejects, from the shard's list, or from the store's if that is damaged."""
    for path in (shard.rejects_path, shard.folder.parent / REJECTED):
        try:
            rejects = read_rejects(path)
        except StoreError:
            continue
        return dict(zip(rejects["file"], rejects["reason"], strict=True))
    return {}


def _open_raw(
    job: Job, source: Path | str | None, damaged: Sequence[_Damaged]
) -> tuple[RawClips, Set[str]]:
    """Open ``source`` if a clip is needed from it; returns also the files that it lacks."""
    names = [d.rows[position]["filename"] for d in damaged for position in d.wanted]
    if source is None or not names:
        return [], set(names)
    try:
        raw = reopen_source(job, source)
    except StoreError as error:
        raise StoreError(
            error.what,
            where=error.where,
            fix=f"{error.fix or 'Name the right one.'} If it is gone, --salvage without --repair "
            "keeps the good clips.",
        ) from None
    return raw, set(raw.missing(names)) if isinstance(raw, Source) else set()


def _difference(
    damaged: Sequence[_Damaged], written: Sequence[Shard], content: str | None
) -> str | None:
    """Return in what the new shards differ from the old ones; None if nothing is known to differ.

    Args:
        written: all shards of the store.
        content: the digest of the old content, if it can be compared. It is used for clips of which
            nothing else is known. Without it there is a warning.
    """
    unknown = []
    returned = set()
    for d in damaged:
        _, faults = check_shard((d.new, d.rows, d.form, None))
        if faults:
            return str(faults[0])
        records = dict(read_records(d.new.path))
        for position, expected in d.wanted.items():
            key = d.rows[position]["key"]
            if position in d.was_lost:
                returned.add(key)
                # The file may give no clip now.
                expected = expected if key in records else {}
            if expected is None:
                unknown.append(key)
            elif not expected.items() <= records.get(key, {}).items():
                return f"clip '{key}' differs"
    if unknown and content is None:
        log.warning(
            "nothing in the store tells whether the raw files of %d damaged clips are those that "
            "it was made from; the first clip: %s",
            len(unknown),
            unknown[0],
        )
    elif unknown:
        entries = [entry for s in written for entry in read_records(s.path)]
        entries.sort(key=lambda entry: entry[0].encode())
        if digest_of((key, record) for key, record in entries if key not in returned) != content:
            return f"one or more of {len(unknown)} damaged clips differ"
    return None
