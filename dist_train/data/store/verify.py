"""Check every byte of a finished store.

The manifest and the lists of rejects say which clips there must be. A shard is sound if these clips
are good (see ``good_clips``), and it is, byte for byte, what ``write_shard`` gives for them. The
index has its own CRC-32C in ``store.json``; if it is sound, records must also agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dist_train.data.store.build_spec import Job, read_job
from dist_train.data.store.clip_table import TABLE, ClipTable
from dist_train.data.store.finish import marker_of
from dist_train.data.store.index import content_digest, index_checksum, look_up, read_index
from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS, read_marker
from dist_train.data.store.rejects import gather_rejects, read_rejects, rejects_csv
from dist_train.data.store.salvage import good_clips
from dist_train.data.store.shards import Shard, archive_size, around_pixels
from dist_train.data.types import Record
from dist_train.errors import StoreError
from dist_train.progress import Progress
from dist_train.system.supervised_pool import each_done


@dataclass(frozen=True)
class Fault:
    """A fault of a store. ``shard``: number of the shard that must be rewritten to mend it."""

    where: Path
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(
    folder: Path, *, workers: int | None = None, progress: Progress | None = None
) -> list[Fault]:
    """Check every byte of a store, and return its faults; there are none in a sound store.

    Args:
        workers: processes; None takes one per available core.
        progress: called with (clips checked, clips in all).

    Raises:
        StoreError: there is no store, or its ``job.json`` or ``manifest.csv`` is damaged.
    """
    job = read_job(folder)
    shards = job.shards(folder)
    own = {path for shard in shards for path in (shard.path, shard.rejects_path)}
    faults = [
        Fault(path, "does not belong to the store; move it away")
        for path in (folder / SHARDS).iterdir()
        if path not in own
    ]
    marker = valid_marker(folder)
    index = sound_index(folder, marker)
    if marker is not None and index is None:
        faults.append(Fault(folder / INDEX, "is not the index that was written"))
    done, total = 0, len(job.table)
    checks = ((shard, job.rows(shard), index) for shard in shards)
    for rows, found in each_done(check_shard, checks, workers):
        faults += found
        done += rows
        if progress:
            progress(done, total)
    if marker is None:
        faults.append(Fault(folder / MARKER, "is missing, or not the marker of a store"))
    elif all(fault.shard is None for fault in faults):
        faults += _check_table(folder, marker, index)
        faults += _check_summaries(folder, job, shards, marker, index)
    return sorted(faults, key=lambda fault: (fault.where, fault.what))


def valid_marker(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``store.json``; None if it is missing or damaged."""
    try:
        return read_marker(folder)
    except StoreError:
        return None


def sound_index(folder: Path, marker: Mapping[str, Any] | None) -> Path | None:
    """Return the index; None if it does not have the checksum in the marker."""
    path = folder / INDEX
    try:
        sound = marker is not None and marker["index_crc32c"] == index_checksum(path)
    except StoreError:
        return None
    return path if sound else None


def _check_table(folder: Path, marker: dict[str, Any], index: Path | None) -> Iterator[Fault]:
    """Compare the clip table with its checksums, and with the index if that is sound."""
    if "table_crc32c" not in marker:
        return
    path = folder / TABLE
    try:
        table = ClipTable.open(path, marker["table_crc32c"], None)
        table.check()
    except StoreError as error:
        yield Fault(path, error.what)
        return
    if index is not None and (what := table.differs(read_index(index), marker["shards"])):
        yield Fault(path, what)


def _check_summaries(
    folder: Path,
    job: Job,
    shards: Sequence[Shard],
    marker: dict[str, Any],
    index: Path | None,
) -> Iterator[Fault]:
    """Compare ``rejected.csv`` and ``store.json`` with the shards."""
    rejects = gather_rejects(shards)
    path = folder / REJECTED
    if not path.is_file() or path.read_bytes() != rejects_csv(rejects).encode():
        yield Fault(path, "is not the sum of the shards' lists of rejects")
    content = marker.get("content")
    if content is not None and index is not None:
        content = content_digest(index)
    table = marker.get("table_crc32c")
    if marker != marker_of(job, shards, rejects, marker["index_crc32c"], content, table):
        yield Fault(folder / MARKER, "does not say what the store holds")


def check_shard(check: tuple[Shard, Sequence[Record], Path | None]) -> tuple[int, list[Fault]]:
    """Return the number of a shard's rows, and its faults.

    Args:
        check: the shard, its rows of the manifest, and the index if that is sound.
    """
    shard, rows, index_path = check
    if not shard.path.is_file():
        return len(rows), [Fault(shard.path, "the shard is missing", shard.number)]
    try:
        rejects = read_rejects(shard.rejects_path)
    except StoreError as error:
        return len(rows), [Fault(shard.rejects_path, error.what, shard.number)]
    rejected = set(zip(rejects["file"], rejects["class"], strict=True))
    listed = {(row["filename"], str(row["label"])) for row in rows}
    if len(rejected) < len(rejects) or not rejected <= listed:
        what = "the list names files that are not of this shard"
        return len(rows), [Fault(shard.rejects_path, what, shard.number)]
    index = None if index_path is None else look_up(index_path, [row["key"] for row in rows])
    good = good_clips(shard.path, rows, index)
    names = set(rejects["file"])
    expected = {row["key"]: i for i, row in enumerate(rows) if row["filename"] not in names}
    found = [f"clip '{k}' is missing or damaged" for k, i in expected.items() if i not in good]
    found += [f"clip '{k}' is in the index and rejected" for k in index or () if k not in expected]
    if not found:
        clips = {key: good[position] for key, position in expected.items()}
        if not _has_right_bytes(shard, clips, index):
            found = ["its bytes are not those of its clips"]
    return len(rows), [Fault(shard.path, what, shard.number) for what in found]


def _has_right_bytes(
    shard: Shard, clips: Mapping[str, Record], index: Mapping[str, Record] | None
) -> bool:
    """Whether the shard is what ``write_shard`` gives for its good clips, and the index says so."""
    end = 0
    with shard.path.open("rb") as file:
        for key, record in clips.items():
            before, after = around_pixels(key, record)
            begin, end = end, record["offset"] + record["length"] + len(after)
            if (
                record["offset"] != begin + len(before)
                or _read(file, begin, len(before)) != before
                or _read(file, end - len(after), len(after)) != after
                or (index is not None and index[key] != record | {"shard": shard.number})
            ):
                return False
        size = archive_size(end)
        return shard.path.stat().st_size == size and not _read(file, end, size).strip(b"\0")


def _read(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
