"""Check every byte of a finished store.

The manifest and the lists of rejects say which clips there must be. A shard is sound if these clips
are good (see ``good_clips``), and it is, byte for byte, what ``write_shard`` gives for them. The
index has its own CRC-32C in ``store.json``; if it is sound, records must also agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from dist_train.data.store.build_spec import JOB, Job, read_job
from dist_train.data.store.clip_table import TABLE, ClipTable
from dist_train.data.store.finish import marker_of
from dist_train.data.store.index import content_digest, index_checksum, look_up, read_index
from dist_train.data.store.reader import INDEX, MANIFEST, MARKER, REJECTED, SHARDS, read_marker
from dist_train.data.store.rejects import gather_rejects, read_rejects, rejects_csv
from dist_train.data.store.salvage import good_clips
from dist_train.data.store.shards import Form, Shard, archive_size, around_pixels
from dist_train.data.types import Record
from dist_train.errors import MissingObjectError, StoreError
from dist_train.objects import Objects
from dist_train.places import Location, is_url, local_path
from dist_train.progress import Progress
from dist_train.system.supervised_pool import each_done

#: A shard, its rows of the manifest, the form of its clips, and the index if that is sound.
Check = tuple[Shard, Sequence[Record], Form, Path | None]


@dataclass(frozen=True)
class Fault:
    """A fault of a store. ``shard``: number of the shard that must be rewritten to mend it."""

    where: Location
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(
    place: Location, *, workers: int | None = None, progress: Progress | None = None
) -> list[Fault]:
    """Check every byte of a store, and return its faults; there are none in a sound store.

    Shards behind a URL come to the system's temporary folder, one for each worker at a time.

    Args:
        place: the store's folder or URL.
        workers: processes; None takes one per available core.
        progress: called with (clips checked, clips in all).

    Raises:
        StoreError: there is no store, or its ``job.json`` or ``manifest.csv`` is damaged.
        RemoteError: the server cannot be reached, or refuses.
    """
    if not is_url(place):
        return _verify(local_path(place), None, workers, progress)
    objects = Objects(str(place))
    with TemporaryDirectory(prefix="dist_train-") as temporary:
        folder = Path(temporary)
        (folder / SHARDS).mkdir()
        for name in (JOB, MANIFEST, INDEX, TABLE, MARKER, REJECTED):
            _bring(objects, folder, name)
        try:
            found = _verify(folder, objects, workers, progress)
        except StoreError as error:
            at = _url_of(folder, objects, Path(str(error.where)))
            raise StoreError(error.what, where=at, fix=error.fix) from None
        return [
            replace(fault, where=_url_of(folder, objects, Path(fault.where))) for fault in found
        ]


def _url_of(folder: Path, objects: Objects, path: Path) -> str:
    return objects.where(str(path.relative_to(folder)))


def _bring(objects: Objects, folder: Path, name: str) -> None:
    (folder / name).touch()
    try:
        objects.download(name, folder / name)
    except MissingObjectError:
        (folder / name).unlink()


def _verify(
    folder: Path, objects: Objects | None, workers: int | None, progress: Progress | None
) -> list[Fault]:
    """Faults of a store whose shards are in the folder, or else behind ``objects``."""
    job = read_job(folder)
    shards = job.shards(folder)
    own = {path for shard in shards for path in (shard.path, shard.rejects_path)}
    faults = [
        Fault(path, "does not belong to the store; move it away")
        for path in _in_shards(folder, objects)
        if path not in own
    ]
    if objects is not None:
        for shard in shards:
            _bring(objects, folder, str(shard.rejects_path.relative_to(folder)))
    marker = valid_marker(folder)
    index = sound_index(folder, marker)
    if marker is not None and index is None:
        faults.append(Fault(folder / INDEX, "is not the index that was written"))
    done, total = 0, len(job.table)
    checks = ((shard, job.rows(shard), job.form, index) for shard in shards)
    for rows, found in each_done(partial(_brought_and_checked, objects), checks, workers):
        faults += found
        done += rows
        if progress:
            progress(done, total)
    if marker is None:
        faults.append(Fault(folder / MARKER, "is missing, or not the marker of a store"))
    elif all(fault.shard is None for fault in faults):
        faults += _check_table(folder, job.form, marker, index)
        faults += _check_summaries(folder, job, shards, marker, index)
    return sorted(faults, key=lambda fault: (fault.where, fault.what))


def _in_shards(folder: Path, objects: Objects | None) -> list[Path]:
    if objects is None:
        return list((folder / SHARDS).iterdir())
    return [folder / name for name in objects.names(SHARDS) or ()]


def _brought_and_checked(objects: Objects | None, check: Check) -> tuple[int, list[Fault]]:
    shard, *_ = check
    if objects is None:
        return check_shard(check)
    try:
        _bring(objects, shard.folder.parent, f"{SHARDS}/{shard.path.name}")
        return check_shard(check)
    finally:
        shard.path.unlink(missing_ok=True)


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


def _check_table(
    folder: Path, form: Form, marker: dict[str, Any], index: Path | None
) -> Iterator[Fault]:
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
    if index is None:
        return
    classes = len(marker.get("classes") or "01")
    if what := table.differs(read_index(index), marker["shards"], form, classes):
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


def check_shard(check: Check) -> tuple[int, list[Fault]]:
    """Return the number of a shard's rows, and its faults."""
    shard, rows, form, index_path = check
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
    good = good_clips(shard.path, rows, form, index)
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
