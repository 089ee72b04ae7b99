"""Check every byte of a finished store.

The manifest in the store says which clips there must be. A shard is sound if it is, byte for byte,
what ``write_shard`` gives for its records and pixels, and the pixels have their CRC-32C. The index
has its own CRC-32C in ``store.json``; if it is sound, the shards' records are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dist_train.data.store.build_spec import Job, read_job
from dist_train.data.store.finish import marker_of
from dist_train.data.store.index import content_digest, index_checksum, look_up
from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS, read_marker
from dist_train.data.store.rejects import gather_rejects, read_rejects, rejects_csv
from dist_train.data.store.shards import Shard, archive_size, around_pixels, read_records, to_record
from dist_train.data.types import Record
from dist_train.errors import StoreError
from dist_train.files import crc32c
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
    for number, found in each_done(check_shard, checks, workers):
        faults += found
        done += job.clips(shards[number])
        if progress:
            progress(done, total)
    if marker is None:
        faults.append(Fault(folder / MARKER, "is missing, or not the marker of a store"))
    elif all(fault.shard is None for fault in faults):
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
    if marker != marker_of(job, shards, rejects, marker["index_crc32c"], content):
        yield Fault(folder / MARKER, "does not say what the store holds")


def check_shard(check: tuple[Shard, Sequence[Record], Path | None]) -> tuple[int, list[Fault]]:
    """Return the number of a shard, and its faults.

    Args:
        check: the shard, its rows of the manifest, and the index if that is sound.
    """
    shard, rows, index_path = check
    if not shard.path.is_file():
        return shard.number, [Fault(shard.path, "the shard is missing", shard.number)]
    try:
        rejects = read_rejects(shard)
    except StoreError as error:
        return shard.number, [Fault(shard.rejects_path, error.what, shard.number)]
    labels = {row["filename"]: str(row["label"]) for row in rows}
    rejected = dict(zip(rejects["file"], rejects["class"], strict=True))
    expected = {row["key"]: to_record(row) for row in rows if row["filename"] not in rejected}
    index = None if index_path is None else look_up(index_path, [row["key"] for row in rows])
    clips: dict[str, Record] = {}
    unreadable = None
    try:
        # On an error, the update keeps the clips before the damage.
        clips.update(read_records(shard.path))
    except StoreError as error:
        unreadable = error.what
    found = [unreadable] if unreadable else []
    # Repair also finds good clips behind damaged headers.
    absent = "is missing, or cannot be reached" if unreadable else "is missing"
    found += [f"clip '{key}' {absent}" for key in expected.keys() - clips.keys()]
    found += _record_faults(shard.number, expected, clips, index)
    found += _byte_faults(shard.path, clips)
    faults = [Fault(shard.path, what, shard.number) for what in found]
    if not rejected.items() <= labels.items():
        what = "the list names files that are not of this shard"
        faults.append(Fault(shard.rejects_path, what, shard.number))
    return shard.number, faults


def _record_faults(
    shard: int,
    expected: Mapping[str, Record],
    clips: Mapping[str, Record],
    index: Mapping[str, Record] | None,
) -> Iterator[str]:
    """Compare the shard's records with manifest and index, and the index with the manifest."""
    for key, record in clips.items():
        if key not in expected:
            yield f"clip '{key}' does not belong to the shard"
        elif not expected[key].items() <= record.items():
            yield f"clip '{key}': its record is not that of the manifest"
        elif index is not None and index.get(key) != record | {"shard": shard}:
            yield f"clip '{key}': its record is not that of the index"
    for key in (index or {}).keys() - expected.keys():
        yield f"clip '{key}' is in the index, and should not be"


def _byte_faults(path: Path, clips: Mapping[str, Record]) -> Iterator[str]:
    """Check the pixels by their CRC-32C; other bytes must be those that ``write_shard`` gives."""
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
