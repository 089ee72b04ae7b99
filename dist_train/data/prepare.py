"""Raw files -> store: decode, crop, write, and join.

A shard depends on nothing but its rows of the manifest and the settings. A finished shard is never
written again, unless a file that it rejected was mended, so a killed run goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import TypeAdapter

from dist_train.data.decode import (
    VIDEO_SUFFIXES,
    VOLUME_SUFFIXES,
    Video,
    Volume,
    read_volume,
    to_uint8_volume,
)
from dist_train.data.files import write_whole
from dist_train.data.index import index_checksum, write_index
from dist_train.data.job import Job, Part, Shard, read_job, to_record, writing
from dist_train.data.manifest import Manifest
from dist_train.data.medmnist import read_medmnist
from dist_train.data.pool import each_done
from dist_train.data.roi import Box, OutlineColour, crop_to_outline, stack_planes
from dist_train.data.shards import Record, write_shard
from dist_train.data.store import FORMAT, INDEX, MARKER, REJECTED, read_marker
from dist_train.errors import DecodeError, RoiError, StoreError

# Raised whenever the same file and settings would give other pixels.
PIXELS_VERSION = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PrepareSettings:
    """What the pixels of a store depend on, beside the files themselves.

    ``roi``: "outline" crops to the union of the outline's boxes; "none" keeps whole frames.
    ``truncated``: whether a video with fewer frames than it declares is rejected or kept.
    """

    roi: Literal["outline", "none"] = "outline"
    colour: OutlineColour = field(default_factory=OutlineColour)
    truncated: Literal["reject", "keep"] = "reject"
    shard_clips: int = 128


def prepare(
    manifest: Manifest,
    source: Path,
    out: Path,
    settings: PrepareSettings,
    *,
    workers: int | None = None,
    max_rejected: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write, or go on writing, the store ``out`` from the files of ``manifest`` under ``source``.

    Args:
        workers: processes; None takes one per available core.
        max_rejected: largest share of the clips that may be rejected.
        progress: called with (clips done, clips in all).

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: the folder belongs to other settings or another writer, a file is missing, or
            too many clips, or all of them, were rejected.
    """
    job = _job(manifest.table, settings)
    shards = job.shards(out)
    tasks = _from_files(shards, source, settings)
    with writing(out, job):
        _write_shards(out, tasks, workers, progress)
        return finish(out, job, shards, max_rejected)


def prepare_part(
    manifest: Manifest,
    source: Path,
    out: Path,
    settings: PrepareSettings,
    part: Part,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one part of the shards that ``prepare`` would; ``finalize`` joins the parts.

    Part i of N has shards i - 1, i - 1 + N, ... Parts may run at the same time, on one machine or
    on many that share the folder.

    Raises:
        StoreError: as for ``prepare``; or the same part, the whole, or a part by another N is being
            written by another process.
    """
    job = _job(manifest.table, settings)
    tasks = _from_files(part.of(job.shards(out)), source, settings)
    with writing(out, job, part):
        _write_shards(out, tasks, workers, progress)


def finalize(out: Path, *, max_rejected: float = 0.01) -> dict[str, Any]:
    """Join the shards that parts wrote into a finished store, the same as ``prepare`` gives.

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: shards are missing, the store is being written, or too many clips were rejected.
    """
    job = read_job(out)
    shards = job.shards(out)
    with writing(out, job):
        missing = [shard for shard in shards if not shard.is_written()]
        if missing:
            raise StoreError(
                f"{len(missing)} of {len(shards)} shards are not written yet, the first is "
                f"{missing[0].path.name}",
                where=out,
                fix=f"Part i of N has the shards whose number divided by N leaves i - 1: run "
                f"'dist-train prepare --part i/N' where one is missing (numbers: "
                f"{', '.join(str(shard.number) for shard in missing[:10])}"
                f"{', ...' if len(missing) > 10 else ''}).",
            )
        return finish(out, job, shards, max_rejected)


def prepare_npz(
    path: Path, out: Path, *, shard_clips: int = 128, progress: Progress | None = None
) -> dict[str, Any]:
    """Store a MedMNIST 3D file (see ``medmnist``), with its official split.

    Raises:
        StoreError: the file is not of this form, or the folder belongs to other settings.
    """
    table, volumes = read_medmnist(path)
    settings = PrepareSettings(roi="none", shard_clips=shard_clips)
    job = _job(table, settings, npz=_digest(path))
    shards = job.shards(out)
    tasks = _from_arrays(shards, volumes, settings)
    with writing(out, job):
        # The volumes are in memory here: writing them takes less than handing them to processes.
        _write_shards(out, tasks, 1, progress)
        return finish(out, job, shards, 0.0)


@dataclass(frozen=True)
class Task:
    """A shard to write, and where its clips come from: a folder, or arrays at hand."""

    shard: Shard
    settings: PrepareSettings
    source: Path | Sequence[Volume]

    def finished(self) -> bool:
        """Whether the shard is there, and no file that it rejected was mended since."""
        if not self.shard.is_written():
            return False
        if not isinstance(self.source, Path):
            return True
        written = self.shard.path.stat().st_mtime
        # The time of the inode: a good copy that is moved or unpacked into place may well carry an
        # old modification time.
        return all(
            (self.source / name).stat().st_ctime <= written for name in self.shard.rejects()["file"]
        )


def tasks_again(job: Job, shards: Sequence[Shard], source: Path) -> list[Task]:
    """How to write ``shards`` of a store once more, from what the store was made of.

    Args:
        source: the folder of raw files, or the MedMNIST file.

    Raises:
        StoreError: ``source`` is not that, or this version would give other pixels.
    """
    if job.made_from["pixels_version"] != PIXELS_VERSION:
        raise StoreError(
            f"the store was made by version {job.made_from['pixels_version']} of the decoder path, "
            f"this is version {PIXELS_VERSION}",
            fix="Use the release that made it, or prepare it anew in another folder.",
        )
    settings = TypeAdapter(PrepareSettings).validate_python(job.made_from["settings"])
    if "npz" not in job.made_from:
        return _from_files(shards, source, settings)
    _, volumes = read_medmnist(source)
    if _digest(source) != job.made_from["npz"]:
        raise StoreError("is not the file that the store was made from", where=source)
    return _from_arrays(shards, volumes, settings)


def _job(table: pd.DataFrame, settings: PrepareSettings, **more: str) -> Job:
    return Job.of(table, pixels_version=PIXELS_VERSION, settings=asdict(settings), **more)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _from_files(shards: Sequence[Shard], source: Path, settings: PrepareSettings) -> list[Task]:
    if not source.is_dir():
        raise StoreError("the source folder does not exist", where=source)
    names = [row["filename"] for shard in shards for row in shard.rows]
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise StoreError(
            f"the file is missing ({len(missing)} such in the manifest)",
            where=source / missing[0],
            fix="Check --source, or take it out of the manifest.",
        )
    return [Task(shard, settings, source) for shard in shards]


def _from_arrays(
    shards: Sequence[Shard], volumes: Sequence[Volume], settings: PrepareSettings
) -> list[Task]:
    size = settings.shard_clips
    return [
        Task(shard, settings, volumes[shard.number * size : (shard.number + 1) * size])
        for shard in shards
    ]


def _write_shards(
    out: Path, tasks: Sequence[Task], workers: int | None, progress: Progress | None
) -> None:
    """Write those of ``tasks`` that are not finished."""
    total = sum(len(task.shard.rows) for task in tasks)
    todo = [task for task in tasks if not task.finished()]
    if todo:
        # Readers take a store for whole when it has its marker.
        (out / MARKER).unlink(missing_ok=True)
    done = total - sum(len(task.shard.rows) for task in todo)
    if progress:
        progress(done, total)
    for count in each_done(write_task, todo, workers):
        done += count
        if progress:
            progress(done, total)


def write_task(task: Task) -> int:
    """Write one shard and its list of rejects, anew if they are there; returns its rows' number."""
    # Else a kill between the new list of rejects and the new shard would leave the old shard, which
    # lacks the mended clip, beside a list that does not name it.
    task.shard.path.unlink(missing_ok=True)
    rejects: list[tuple[str, str, int]] = []
    write_shard(task.shard.path, _samples(task, rejects))
    return len(task.shard.rows)


def _samples(
    task: Task, rejects: list[tuple[str, str, int]]
) -> Iterator[tuple[str, Volume, Record]]:
    for position, row in enumerate(task.shard.rows):
        try:
            if isinstance(task.source, Path):
                clip, facts = _read_clip(task.source / row["filename"], task.settings)
            else:
                clip = to_uint8_volume(task.source[position], row["filename"])
                facts = {"frames_declared": clip.shape[0], "box": None}
        except (DecodeError, RoiError) as error:
            rejects.append((row["filename"], str(error), row["label"]))
            continue
        yield row["key"], clip, to_record(row) | facts
    # Written before the shard is renamed into place, so a shard that exists has its list.
    write_whole(task.shard.rejects_path, _csv(rejects))


def _read_clip(path: Path, settings: PrepareSettings) -> tuple[Volume, Record]:
    suffix = path.suffix.lower()
    if suffix in VOLUME_SUFFIXES:
        if settings.roi == "outline":
            raise RoiError(
                "a volume has no coloured outline", where=path, fix="Prepare it with --roi none."
            )
        clip = read_volume(path)
        return clip, {"frames_declared": clip.shape[0], "box": None}
    if suffix not in VIDEO_SUFFIXES:
        known = " ".join(sorted(VIDEO_SUFFIXES | VOLUME_SUFFIXES))
        raise DecodeError(f"unknown kind of file '{suffix}'", where=path, fix=f"Known: {known}.")
    video = Video(path)
    box = None
    if settings.roi == "outline":
        clip, found = crop_to_outline(video, settings.colour)
        box = [found.top, found.left, found.bottom, found.right]
    else:
        planes = [frame.luma for frame in video]
        clip = stack_planes(planes, Box(0, 0, *planes[0].shape))
    if video.truncated and settings.truncated == "reject":
        because = f": {video.stopped_by}" if video.stopped_by else ""
        raise DecodeError(
            f"the video stops after {video.frames_decoded} of {video.frames_declared} declared "
            f"frames{because}",
            where=path,
            fix="Replace the file, or prepare with --truncated keep.",
        )
    return clip, {"frames_declared": video.frames_declared, "box": box}


def finish(out: Path, job: Job, shards: Sequence[Shard], max_rejected: float) -> dict[str, Any]:
    """Gather the rejects, judge them, build the index, and write the marker last.

    Raises:
        StoreError: too many clips were rejected, or a shard does not hold what it should.
    """
    rejects = gather_rejects(shards)
    write_whole(out / REJECTED, rejects.to_csv(index=False))
    total = len(job.table)
    if len(rejects) / total > max_rejected or len(rejects) == total:
        (out / MARKER).unlink(missing_ok=True)
        raise StoreError(
            f"{len(rejects)} of {total} clips were rejected ({by_class(count_classes(rejects))}), "
            f"and --max-rejected is {max_rejected:g}; the first: {rejects['reason'].iloc[0]}",
            where=out / REJECTED,
            fix="Mend or remove the files, or raise --max-rejected: finished work is kept.",
        )
    if (out / MARKER).exists() and (out / INDEX).exists():
        return read_marker(out)
    clips = write_index(out / INDEX, [shard.path for shard in shards])
    if clips != total - len(rejects):
        raise StoreError(
            f"the shards hold {clips} clips, not the {total - len(rejects)} that were written",
            where=out,
            fix="Run 'dist-train verify' with --repair, which rebuilds the damaged ones.",
        )
    marker = marker_of(job, shards, rejects, index_checksum(out / INDEX))
    write_whole(out / MARKER, json.dumps(marker, indent=2, sort_keys=True))
    return marker


def gather_rejects(shards: Sequence[Shard]) -> pd.DataFrame:
    """The rejects of all shards, in the order of the manifest."""
    return pd.concat([shard.rejects() for shard in shards])


def count_classes(rejects: pd.DataFrame) -> dict[str, int]:
    """Number of rejects by class: "0", "1", or "-1" where it is not known."""
    return {str(k): int(v) for k, v in rejects["class"].value_counts().items()}


def by_class(counts: Mapping[str, int]) -> str:
    """Counts by class, in words."""
    names = {"0": "negative", "1": "positive", "-1": "unlabelled"}
    return ", ".join(f"{counts[label]} {name}" for label, name in names.items() if label in counts)


def marker_of(
    job: Job, shards: Sequence[Shard], rejects: pd.DataFrame, index_crc32c: int | None
) -> dict[str, Any]:
    """What ``store.json`` says of a finished store."""
    return {
        "format": FORMAT,
        "fingerprint": job.fingerprint,
        "settings": job.made_from["settings"],
        "clips": len(job.table) - len(rejects),
        "shards": len(shards),
        "rejected": count_classes(rejects),
        "index_crc32c": index_crc32c,
    }


def _csv(rejects: Sequence[tuple[str, str, int]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "reason", "class"))
    writer.writerows(rejects)
    return text.getvalue()
