"""Raw files -> store: decode, crop, write, and join.

A shard depends on nothing but its rows of the manifest and the settings. A finished shard is never
written again, unless a file that it rejected was mended, so a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import TypeAdapter

from dist_train.data.raw.bit_depth import depth_of_arrays, depth_of_files
from dist_train.data.raw.clip import PIXELS_VERSION, PrepareSettings
from dist_train.data.raw.medmnist import read_medmnist
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.remote import manifest_source, open_source
from dist_train.data.raw.source import MISSING, UNFETCHED, LocalFolder, Source
from dist_train.data.store.build_spec import (
    Job,
    Part,
    lost_of,
    read_job,
    read_rejects,
    settings_before,
    writing,
)
from dist_train.data.store.index import content_digest, index_checksum, write_index
from dist_train.data.store.reader import FORMAT, INDEX, MARKER, REJECTED, read_marker
from dist_train.data.store.salvage import good_clips
from dist_train.data.store.shard_task import Task, write_task
from dist_train.data.store.shards import Shard
from dist_train.data.table.manifest import Manifest
from dist_train.data.types import Volume
from dist_train.errors import ManifestError, StoreError
from dist_train.files import open_plain, sealed, write_whole
from dist_train.progress import Progress
from dist_train.safe_text import for_spreadsheet
from dist_train.system.supervised_pool import UNWATCHED, Limits, supervised

log = logging.getLogger(__name__)


# Who writes the shards: processes of this machine, or tasks of a Ray cluster whose nodes all see
# the same folders.
Engine = Literal["local", "ray"]


def prepare(
    manifest: Manifest,
    source: Source | Path | str | None,
    out: Path,
    settings: PrepareSettings,
    *,
    engine: Engine = "local",
    workers: int | None = None,
    max_rejected: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write, or go on writing, the store ``out`` from the files of ``manifest`` in ``source``.

    Args:
        source: a folder, a URL that file names are added to, or None for the manifest's own URLs.
        workers: processes, or tasks at a time; None takes one per available core.
        max_rejected: largest share of the clips that may be rejected.
        progress: called with (clips done, clips in all).

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: the folder belongs to other settings or another writer, a file is missing, or
            too many clips, or all of them, were rejected.
    """
    files = _source_of(manifest, source)
    job = _job(manifest.table, settings)
    shards = job.shards(out)
    _refuse_one_file_twice(manifest, files)
    check_files(job, shards, files, max_rejected)
    job = _with_depth(out, job, files, engine, workers)
    with writing(out, job):
        _write_unfinished(out, job, shards, files, engine, workers, progress)
        return finish(out, job, shards, max_rejected)


def prepare_part(
    manifest: Manifest,
    source: Source | Path | str | None,
    out: Path,
    settings: PrepareSettings,
    part: Part,
    *,
    engine: Engine = "local",
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
    files = _source_of(manifest, source)
    job = _job(manifest.table, settings)
    shards = part.of(job.shards(out))
    _refuse_one_file_twice(manifest, files)
    # Their number is judged when the parts are joined.
    check_files(job, shards, files, 1.0)
    job = _with_depth(out, job, files, engine, workers)
    with writing(out, job, part):
        _write_unfinished(out, job, shards, files, engine, workers, progress)


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
    bits = depth_of_arrays(volumes)
    settings = PrepareSettings(roi="none", shard_clips=shard_clips, bits=bits)
    job = _job(table, settings, npz=_digest(path))
    shards = job.shards(out)
    with writing(out, job):
        _write_unfinished(out, job, shards, volumes, "local", 1, progress)
        return finish(out, job, shards, 0.0)


def source_again(job: Job, place: Path | str) -> Source | Sequence[Volume]:
    """What a store was made of, to write shards of it once more.

    Args:
        place: the folder or URL of the raw files, or the MedMNIST file.

    Raises:
        StoreError: it is not that, or this version would give other pixels.
    """
    if job.made_from["pixels_version"] != PIXELS_VERSION:
        raise StoreError(
            f"the store was made by version {job.made_from['pixels_version']} of the decoder path, "
            f"this is version {PIXELS_VERSION}",
            fix="Use the release that made it, or prepare it anew in another folder.",
        )
    reader = settings_of(job).reader
    if reader is not None and OutsideReader.named(reader.path).sha256 != reader.sha256:
        raise StoreError(
            f"the store was made by version {reader.version} of {reader.path}, and its source is "
            "another one here",
            fix="Install the version that made it, or prepare the store anew in another folder.",
        )
    if "npz" not in job.made_from:
        return open_source(place)
    path = Path(place)
    _, volumes = read_medmnist(path)
    if _digest(path) != job.made_from["npz"]:
        raise StoreError("is not the file that the store was made from", where=path)
    return volumes


def check_files(
    job: Job,
    shards: Sequence[Shard],
    source: Source | Sequence[Volume],
    max_rejected: float = 0.0,
) -> None:
    """Refuse, before any work, what a look at the files' names shows to be refused in the end.

    Args:
        shards: those that are written already are passed over.
        max_rejected: largest share of the store's clips whose files may be missing from these
            shards; they will be rejects. Files that a shard there rejected already do not count.

    Raises:
        StoreError: more files are missing, or all those of the store.
    """
    if not isinstance(source, Source):
        return
    unwritten = [shard for shard in shards if not shard.is_written()]
    names = [name for shard in unwritten for name in job.filenames(shard)]
    missing = source.missing(names)
    if not missing:
        return
    known = {name for shard in unwritten for name in _rejected(shard)}
    new = [name for name in missing if name not in known]
    # A shard, or a part, may well have no file that is there, if others have.
    some = len(missing) < len(names) or any(not source.missing([n]) for n in job.table["filename"])
    if some and len(new) <= max_rejected * len(job.table):
        return
    first = (new or missing)[0]
    classes = job.table["label"][job.table["filename"].isin(set(missing))].astype(str)
    hint = source.hint(first)
    raise StoreError(
        f"{MISSING} ({len(missing)} of {len(names)} files are: {by_class(_counts(classes))})",
        where=source.where(first),
        fix=f"{hint} The manifest must name files that are there."
        if hint
        else "Check --source; or leave them out of the manifest (--where chooses rows), or raise "
        "--max-rejected.",
    )


def _rejected(shard: Shard) -> Sequence[str]:
    try:
        return list(read_rejects(shard)["file"])
    except StoreError:
        return ()


def _refuse_one_file_twice(manifest: Manifest, source: Source) -> None:
    names = manifest.table["filename"]
    twice = source.twice(names.tolist())
    if twice is not None:
        lines = [manifest.line(int((names == name).to_numpy().argmax())) for name in twice]
        raise ManifestError(
            f"'{twice[0]}' ({lines[0]}) and '{twice[1]}' ({lines[1]}) are one file",
            fix="Each clip may be listed once.",
        )


def write_shards(
    job: Job,
    shards: Sequence[Shard],
    source: Source | Sequence[Volume],
    engine: Engine = "local",
    workers: int | None = None,
    amend: Callable[[Task], Task] = lambda task: task,
) -> Iterator[int]:
    """Write these shards, anew where they are there; yields how many rows each had.

    Args:
        amend: changes a shard's task before it is done.

    Raises:
        StoreError: a worker was killed, or the source is gone.
        OSError: the disk is full, or cannot be written.
    """
    settings = settings_of(job)
    limits = _limits_of(settings)
    todo = map(amend, tasks(job, shards, source))
    if not isinstance(source, Source):
        # The volumes are in memory here: writing them takes less than handing them to processes.
        return (write_task(task, UNWATCHED) for task in todo)
    return _runner(engine)(write_task, todo, Task.without, limits, workers)


def _limits_of(settings: PrepareSettings) -> Limits:
    """What decoding a file may take in a worker, which may import the reader from now on."""
    if settings.reader is not None:
        settings.reader.check()
    return Limits(settings.clip_seconds, settings.clip_memory << 20)


def _runner(engine: Engine) -> Callable[..., Iterator[Any]]:
    if engine == "ray":
        from dist_train.data.store.ray_engine import on_ray

        return on_ray
    return supervised


def _with_depth(out: Path, job: Job, source: Source, engine: Engine, workers: int | None) -> Job:
    """The job with the depth of 16-bit values settled: what was asked for, what the store has
    already, or what all of its files say."""
    settings = settings_of(job)
    if settings.bits is not None:
        return job
    before = settings_before(out)
    if before is not None:
        bits = before.get("bits")
    else:
        limits = _limits_of(settings)
        run = partial(_runner(engine), limits=limits, workers=workers)
        bits = depth_of_files(source, list(job.table["filename"]), run, settings.reader)
    return _job(job.table, replace(settings, bits=bits))


def _write_unfinished(
    out: Path,
    job: Job,
    shards: Sequence[Shard],
    source: Source | Sequence[Volume],
    engine: Engine,
    workers: int | None,
    progress: Progress | None,
) -> None:
    todo = [shard for shard in shards if not finished(shard, source)]
    _tell_changed(sorted(set(shards) - set(todo), key=lambda shard: shard.number), job, source)
    if todo:
        # Readers take a store for whole when it has its marker.
        (out / MARKER).unlink(missing_ok=True)
    total = sum(map(job.clips, shards))
    done = total - sum(map(job.clips, todo))
    if progress:
        progress(done, total)
    for count in write_shards(job, todo, source, engine, workers):
        done += count
        if progress:
            progress(done, total)


def _tell_changed(stored: Sequence[Shard], job: Job, source: Source | Sequence[Volume]) -> None:
    """Warn of raw files that are newer than the shards with their clips, which are kept.

    Files of this machine alone: asking a server for half a million files takes hours.
    """
    if not isinstance(source, LocalFolder):
        return
    changed = [
        name
        for shard in stored
        for name in job.filenames(shard)
        if source.changed_since(name, shard.path.stat().st_mtime)
    ]
    if changed:
        log.warning(
            "%d raw files were changed or moved since their clips were stored, the first is %s: "
            "the store keeps what it has of them; prepare into another folder to read them anew",
            len(changed),
            source.where(changed[0]),
        )


def _job(table: pd.DataFrame, settings: PrepareSettings, **more: str) -> Job:
    given = asdict(settings)
    if settings.reader is None:
        # As in stores of earlier versions, whose fingerprint has to stay.
        del given["reader"]
    return Job.of(table, pixels_version=PIXELS_VERSION, settings=given, **more)


def _source_of(manifest: Manifest, source: Source | Path | str | None) -> Source:
    if source is None:
        return manifest_source(manifest)
    return source if isinstance(source, Source) else open_source(source)


def _digest(path: Path) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish(
    out: Path, job: Job, shards: Sequence[Shard], max_rejected: float, *, anew: bool = False
) -> dict[str, Any]:
    """Gather the rejects, judge them, build the index, and write the marker last.

    Args:
        anew: build index and marker also where they are there.

    Raises:
        StoreError: too many clips were rejected, or a shard does not hold what it should.
    """
    rejects = gather_rejects(shards)
    write_whole(out / REJECTED, rejects_csv(rejects))
    total = len(job.table)
    if len(rejects) / total > max_rejected or len(rejects) == total:
        # A marker that is there belongs to a store that was finished with a larger --max-rejected.
        raise StoreError(
            f"{len(rejects)} of {total} clips were rejected ({by_class(count_classes(rejects))}), "
            f"and --max-rejected is {max_rejected:g}; the first: {rejects['file'].iloc[0]}: "
            f"{rejects['reason'].iloc[0].rstrip('.')}",
            where=out / REJECTED,
            fix="Mend or remove the files, or raise --max-rejected: finished work is kept.",
        )
    before = None if anew else _marker_before(out, job, shards, rejects)
    if before is not None:
        return before
    clips = write_index(out / INDEX, [shard.path for shard in shards])
    if clips != total - len(rejects):
        raise StoreError(
            f"the shards hold {clips} clips, not the {total - len(rejects)} that were written",
            where=out,
            fix="Run 'dist-train verify' with --repair, which rebuilds the damaged ones.",
        )
    content = content_digest(out / INDEX)
    marker = marker_of(job, shards, rejects, index_checksum(out / INDEX), content)
    write_whole(out / MARKER, sealed(marker))
    return marker


def _marker_before(
    out: Path, job: Job, shards: Sequence[Shard], rejects: pd.DataFrame
) -> dict[str, Any] | None:
    """The marker that is there, if it and the index are what this would write."""
    try:
        marker = read_marker(out)
        checksum = index_checksum(out / INDEX)
    except StoreError:
        return None
    expected = marker_of(job, shards, rejects, checksum, marker.get("content"))
    return marker if marker == expected else None


def gather_rejects(shards: Sequence[Shard]) -> pd.DataFrame:
    """The rejects of all shards, in the order of the manifest."""
    return pd.concat([read_rejects(shard) for shard in shards])


def rejects_csv(rejects: pd.DataFrame) -> str:
    """``rejected.csv``, whose names people open in spreadsheets; the shards' lists have them as
    they are."""
    text: str = rejects.assign(file=rejects["file"].map(for_spreadsheet)).to_csv(index=False)
    return text


def count_classes(rejects: pd.DataFrame) -> dict[str, int]:
    """Number of rejects by class: "0", "1", or "-1" where it is not known."""
    return _counts(rejects["class"])


def _counts(classes: pd.Series) -> dict[str, int]:
    return {str(k): int(v) for k, v in classes.value_counts().items()}


def by_class(counts: Mapping[str, int]) -> str:
    """Counts by class, in words."""
    names = {"0": "negative", "1": "positive", "-1": "unlabelled"}
    return ", ".join(f"{counts[label]} {name}" for label, name in names.items() if label in counts)


def marker_of(
    job: Job,
    shards: Sequence[Shard],
    rejects: pd.DataFrame,
    index_crc32c: int,
    content: str | None,
) -> dict[str, Any]:
    """What ``store.json`` says of a finished store; ``content`` is None in older ones."""
    marker = {
        "format": FORMAT,
        "fingerprint": job.fingerprint,
        "settings": job.made_from["settings"],
        "clips": len(job.table) - len(rejects),
        "shards": len(shards),
        "rejected": count_classes(rejects),
        "index_crc32c": index_crc32c,
    }
    return marker if content is None else marker | {"content": content}


# Shards of a job that are still to be written.


def finished(shard: Shard, source: Source | Sequence[Volume]) -> bool:
    """Whether the shard is there, and no file that it rejected was mended or found again since, or
    failed to come for a reason that may pass."""
    if not shard.is_written():
        return False
    lost = lost_of(shard)
    if not isinstance(source, Source):
        return not lost
    rejects = read_rejects(shard)
    if isinstance(source, LocalFolder):
        # By a mount, or a folder that is renamed, files come whose own times do not change.
        lost = lost + list(rejects["file"][rejects["reason"].str.startswith(MISSING)])
    if len(source.missing(lost)) < len(lost):
        return False
    written = shard.path.stat().st_mtime
    if rejects["reason"].str.startswith(UNFETCHED).any():
        return False
    return not any(source.changed_since(name, written) for name in rejects["file"])


def settings_of(job: Job) -> PrepareSettings:
    """The settings that a store is made with."""
    return TypeAdapter(PrepareSettings).validate_python(job.made_from["settings"])


def tasks(job: Job, shards: Iterable[Shard], source: Source | Sequence[Volume]) -> Iterator[Task]:
    """How to write these shards, each made when it is asked for.

    Args:
        source: files by name, or a volume for each row of the manifest.
    """
    settings = settings_of(job)
    for shard in shards:
        rows = job.rows(shard)
        if isinstance(source, Source):
            files: Source | Sequence[Volume] = source.narrowed([row["filename"] for row in rows])
        else:
            first = shard.number * settings.shard_clips
            files = source[first : first + len(rows)]
        # Of a shard that lacks a mended clip, the others are good.
        kept = good_clips(shard.path, rows)
        yield Task(shard, rows, settings, files, old=shard.path, kept=kept)
