"""Every byte of a finished store: what is damaged.

The manifest in the store says which clips there must be. A shard is sound if it is, byte for byte,
what ``write_shard`` gives for its records and pixels, and the pixels have their CRC-32C. The index
has its own CRC-32C in ``store.json``; where it is sound, the shards' records are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dist_train.data.store.build import gather_rejects, marker_of, rejects_csv
from dist_train.data.store.build_spec import Job, read_job, read_rejects
from dist_train.data.store.index import content_digest, index_checksum, look_up
from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS, read_marker
from dist_train.data.store.salvage import good_clips
from dist_train.data.store.shards import (
    Shard,
    archive_size,
    around_pixels,
    read_records,
    to_record,
)
from dist_train.data.types import Record
from dist_train.errors import StoreError
from dist_train.files import crc32c
from dist_train.progress import Progress
from dist_train.system.supervised_pool import each_done


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a store.

    ``shard`` is the number of the shard that must be written again for it, if one must.
    """

    where: Path
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(
    folder: Path, *, workers: int | None = None, progress: Progress | None = None
) -> list[Fault]:
    """Check every byte of a store; an empty list says that it is whole.

    Args:
        workers: processes; None takes one per available core.
        progress: called with (clips checked, clips in all).

    Raises:
        StoreError: there is no store, or ``job.json`` or ``manifest.csv``, by which all else is
            judged, is itself damaged.
    """
    job = read_job(folder)
    shards = job.shards(folder)
    faults = [*_foreign_files(folder, shards)]
    marker, index = marker_of_store(folder), sound_index(folder)
    if marker is not None and index is None:
        faults.append(Fault(folder / INDEX, "is not the index that was written"))
    done, total = 0, len(job.table)
    for number, found in each_done(check_shard, _checks(job, shards, index), workers):
        faults += found
        done += job.clips(shards[number])
        if progress:
            progress(done, total)
    if marker is None:
        faults.append(Fault(folder / MARKER, "is missing, or not the marker of a store"))
    elif all(fault.shard is None for fault in faults):
        faults += _check_summaries(folder, job, shards, marker, index)
    return sorted(faults, key=lambda fault: (fault.where, fault.what))


def marker_of_store(folder: Path) -> dict[str, Any] | None:
    """The content of ``store.json``; None where it is missing, or no marker."""
    try:
        return read_marker(folder)
    except StoreError:
        return None


def sound_index(folder: Path) -> Path | None:
    """The index, or None if it is not, to the byte, the one that was written."""
    marker, path = marker_of_store(folder), folder / INDEX
    try:
        sound = marker is not None and marker["index_crc32c"] == index_checksum(path)
    except StoreError:
        return None
    return path if sound else None


def _foreign_files(folder: Path, shards: Sequence[Shard]) -> Iterator[Fault]:
    own = {path for shard in shards for path in (shard.path, shard.rejects_path)}
    for path in (folder / SHARDS).iterdir():
        if path not in own:
            yield Fault(path, "does not belong to the store; move it away")


def _check_summaries(
    folder: Path,
    job: Job,
    shards: Sequence[Shard],
    marker: dict[str, Any],
    index: Path | None,
) -> Iterator[Fault]:
    """``rejected.csv`` and ``store.json`` say what the shards do."""
    rejects = gather_rejects(shards)
    path = folder / REJECTED
    if not path.is_file() or path.read_bytes() != rejects_csv(rejects).encode():
        yield Fault(path, "is not the sum of the shards' lists of rejects")
    content = marker.get("content")
    if content is not None and index is not None:
        content = content_digest(index)
    if marker != marker_of(job, shards, rejects, marker["index_crc32c"], content):
        yield Fault(folder / MARKER, "does not say what the store holds")


@dataclass(frozen=True)
class Check:
    """A shard, its rows of the manifest, and the index if that is sound."""

    shard: Shard
    rows: Sequence[Record]
    index: Path | None


def _checks(job: Job, shards: Sequence[Shard], index: Path | None) -> Iterator[Check]:
    return (Check(shard, job.rows(shard), index) for shard in shards)


def check_shard(check: Check) -> tuple[int, list[Fault]]:
    """The shard's number, and all that is wrong with it."""
    shard = check.shard
    if not shard.path.is_file():
        return shard.number, [Fault(shard.path, "the shard is missing", shard.number)]
    try:
        rejects = read_rejects(shard)
    except StoreError as error:
        return shard.number, [Fault(shard.rejects_path, error.what, shard.number)]
    labels = {row["filename"]: str(row["label"]) for row in check.rows}
    rejected = dict(zip(rejects["file"], rejects["class"], strict=True))
    rows = {row["key"]: to_record(row) for row in check.rows if row["filename"] not in rejected}
    clips, unreadable = _read_clips(shard.path)
    index = None if check.index is None else look_up(check.index, [r["key"] for r in check.rows])
    behind = good_clips(shard.path, check.rows, index) if unreadable else ()
    whole = {check.rows[position]["key"] for position in behind}
    found = [
        Fault(shard.path, what, shard.number)
        for what in (
            *unreadable,
            *_clip_faults(shard.number, rows, clips, index, whole),
            *_byte_faults(shard.path, clips),
        )
    ]
    if not rejected.items() <= labels.items():
        what = "the list names files that are not of this shard"
        found.append(Fault(shard.rejects_path, what, shard.number))
    return shard.number, found


def _read_clips(path: Path) -> tuple[dict[str, Record], list[str]]:
    """The records up to where the shard cannot be read on, and why it cannot."""
    clips: dict[str, Record] = {}
    try:
        # Up to the damage: an update keeps what came before the error.
        clips.update(read_records(path))
    except StoreError as error:
        return clips, [error.what]
    # What should be a record may be any JSON.
    except (TypeError, AttributeError) as error:
        return clips, [f"is not a readable shard ({error})"]
    return clips, []


def _clip_faults(
    shard: int,
    rows: Mapping[str, Record],
    clips: Mapping[str, Record],
    index: Mapping[str, Record] | None,
    whole: Set[str],
) -> Iterator[str]:
    """Whether manifest, shard and index agree, in both directions.

    Args:
        whole: keys of the clips that repair finds, also behind headers that cannot be read.
    """
    for key in rows.keys() - clips.keys():
        if key in whole:
            yield f"clip '{key}' is whole, but a header before it is damaged"
        else:
            yield f"clip '{key}' is missing"
    for key, record in clips.items():
        if key not in rows:
            yield f"clip '{key}' does not belong to the shard"
        elif not rows[key].items() <= record.items():
            yield f"clip '{key}': its record is not that of the manifest"
        elif index is not None and index.get(key) != record | {"shard": shard}:
            yield f"clip '{key}': its record is not that of the index"
    if index is not None:
        for key in index.keys() - rows.keys():
            yield f"clip '{key}' is in the index, and should not be"


def _byte_faults(path: Path, clips: Mapping[str, Record]) -> Iterator[str]:
    """The pixels by their CRC; all other bytes must be those that ``write_shard`` gives."""
    end = 0
    with path.open("rb") as file:
        for key, record in clips.items():
            before, after = around_pixels(key, record)
            offset, length = record["offset"], record["length"]
            if (
                offset - len(before) != end
                or _read(file, end, len(before)) != before
                or _read(file, offset + length, len(after)) != after
            ):
                yield f"clip '{key}': its headers are damaged"
            elif crc32c(_read(file, offset, length)) != record["crc32c"]:
                yield f"clip '{key}': its pixels are not those that were stored"
            end = offset + length + len(after)
        size = archive_size(end)
        if path.stat().st_size != size or _read(file, end, size - end).strip(b"\0"):
            yield "the bytes after its last readable clip are damaged"


def _read(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
