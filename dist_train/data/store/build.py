"""Raw files -> store: decode, crop, and write shards.

A shard depends on nothing but its rows of the manifest, the settings and the raw files. A finished
shard is rewritten only if a file that it rejected was mended, so a killed run continues.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from dist_train.data.raw.clip import LATER, PIXELS_VERSION, PrepareSettings
from dist_train.data.raw.medmnist import read_medmnist
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.remote import open_source
from dist_train.data.raw.source import MISSING, UNFETCHED, LocalFolder, Source
from dist_train.data.raw.survey import survey, survey_arrays
from dist_train.data.store.build_spec import Job, Part, as_in, read_job, read_made_from, settings_of
from dist_train.data.store.finish import finish
from dist_train.data.store.publish import Publisher, folder_of, publisher_of
from dist_train.data.store.reader import MARKER
from dist_train.data.store.rejects import LOST, by_class, count_classes, lost_in, read_rejects
from dist_train.data.store.salvage import good_clips
from dist_train.data.store.shard_task import RawArray, RawClips, Task, write_task
from dist_train.data.store.shards import Shard
from dist_train.data.store.write_lock import write_lock
from dist_train.data.table.manifest import Manifest
from dist_train.data.types import CLASSES, DTYPES, GREY, DtypeName, class_names
from dist_train.errors import ManifestError, StoreError
from dist_train.files import open_plain
from dist_train.places import Location
from dist_train.progress import Progress
from dist_train.system.supervised_pool import UNWATCHED, Limits, supervised

log = logging.getLogger(__name__)


# Shards are written by processes of this machine, or by tasks of a Ray cluster whose nodes all see
# the same folders.
Engine = Literal["local", "ray"]
# ``supervised``, with a number of workers, or the same on a Ray cluster.
Pool = Callable[..., Iterator[Any]]


def prepare(
    manifest: Manifest,
    source: Source | Path | str,
    out: Location,
    settings: PrepareSettings,
    *,
    like: Path | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    max_rejected: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write, or continue, the store ``out`` from the files of ``manifest`` in ``source``.

    Args:
        out: folder or URL. Shards go to a URL as they are finished.
        source: a folder, a URL that file names are added to, or a ``Source``, such as that of
            ``manifest_source``.
        like: a store from which all settings are taken that pixels depend on, and what was found
            in its files, such as black and white.
        workers: processes, or tasks at a time; None takes one per available core.
        max_rejected: largest share of the clips that may be rejected.
        progress: called with (clips done, clips in all).

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: the folder belongs to other settings or another writer, a file is missing, or
            too many clips, or all of them, were rejected.
    """
    files = source if isinstance(source, Source) else open_source(source)
    run = _pool(engine, workers)
    publisher, folder = publisher_of(out), folder_of(out)
    job, shards = _plan(manifest, files, folder, settings, None, max_rejected, run, like)
    with write_lock(folder, job):
        _write_unfinished(folder, job, shards, files, run, progress, publisher)
        return _finish(folder, job, shards, max_rejected, publisher)


def prepare_part(
    manifest: Manifest,
    source: Source | Path | str,
    out: Location,
    settings: PrepareSettings,
    part: Part,
    *,
    like: Path | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one part of the shards of ``prepare``; ``finalize`` joins the parts.

    Part i of N has shards i - 1, i - 1 + N, ... Parts may run at the same time, on one machine or
    on many that share the folder.

    Raises:
        StoreError: as for ``prepare``; or another process writes the same part, the whole store, or
            a part of another N.
    """
    files = source if isinstance(source, Source) else open_source(source)
    run = _pool(engine, workers)
    # ``finalize`` counts the rejects.
    publisher, folder = publisher_of(out), folder_of(out)
    job, shards = _plan(manifest, files, folder, settings, part, 1.0, run, like)
    with write_lock(folder, job, part):
        _write_unfinished(folder, job, shards, files, run, progress, publisher)


def finalize(out: Location, *, max_rejected: float = 0.01) -> dict[str, Any]:
    """Join the shards that parts wrote into a finished store, the same as ``prepare`` gives.

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: shards are missing, the store is being written, or too many clips were rejected.
    """
    publisher, folder = publisher_of(out), folder_of(out)
    job = read_job(folder)
    shards = job.shards(folder)
    with write_lock(folder, job):
        if publisher is not None:
            publisher.adopt(shards)
        missing = [shard for shard in shards if not shard.is_written()]
        if missing:
            raise StoreError(
                f"{len(missing)} of {len(shards)} shards are not written yet, the first is "
                f"{missing[0].path.name}",
                where=str(out),
                fix=f"Part i of N has the shards whose number divided by N leaves i - 1: run "
                f"'dist-train prepare --part i/N' where one is missing (numbers: "
                f"{', '.join(str(shard.number) for shard in missing[:10])}"
                f"{', ...' if len(missing) > 10 else ''}).",
            )
        return _finish(folder, job, shards, max_rejected, publisher)


def prepare_npz(
    path: Path,
    out: Path,
    *,
    shard_clips: int = 128,
    channels: Sequence[str] = GREY,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a store from a MedMNIST 3D file (see ``medmnist``), with its official split.

    Args:
        channels: names of the channels of images [N, D, H, W, C], which are kept; by default one,
            to which colour is converted.

    Raises:
        StoreError: the file is not of this form, or the folder belongs to other settings.
    """
    table, volumes = read_medmnist(path)
    # Their records have nothing that came later.
    given = PrepareSettings(
        roi="none", shard_clips=shard_clips, channel_names=tuple(channels), record_version=1
    )
    settings = survey_arrays(volumes, given)
    many = table["label"].max() > 1
    names = {"classes": {str(k): str(k) for k in range(table["label"].max() + 1)}} if many else {}
    return _write_arrays(_job(table, settings, npz=_digest(path), **names), volumes, out, progress)


def prepare_arrays(
    manifest: Manifest,
    clips: Sequence[RawArray],
    out: Path,
    *,
    channels: Sequence[str] = GREY,
    shard_clips: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a store from arrays in memory, one for each row of ``manifest``.

    Args:
        clips: arrays of one dtype, uint8, uint16 or float16 (from 0 to 1): [D, H, W], or
            [D, H, W, C] with several ``channels``. Or pairs of an array and further entries of its
            record: ``spacing`` ([z, y, x] in um) and ``interval`` (seconds between frames).

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: the folder belongs to other settings, or a clip has another form.
    """
    if len(clips) != len(manifest.table):
        raise StoreError(f"{len(clips)} clips for {len(manifest.table)} rows of the table")
    pairs = [clip if isinstance(clip, tuple) else (clip, {}) for clip in clips]
    dtype = pairs[0][0].dtype.name if pairs else "uint8"
    if dtype not in DTYPES:
        raise StoreError(f"clips are {dtype}", fix=f"Give one of {', '.join(DTYPES)}.")
    settings = PrepareSettings(
        roi="none",
        shard_clips=shard_clips,
        store_dtype=cast(DtypeName, dtype),
        channel_names=tuple(channels),
    )
    digest = hashlib.sha256()
    for array, record in pairs:
        digest.update(json.dumps([list(array.shape), record]).encode())
        digest.update(np.ascontiguousarray(array).data)
    job = _job(manifest.table, settings, arrays=digest.hexdigest(), **_class_names(manifest))
    return _write_arrays(job, pairs, out, progress)


def _write_arrays(
    job: Job, clips: Sequence[RawArray], out: Path, progress: Progress | None
) -> dict[str, Any]:
    shards = job.shards(out)
    with write_lock(out, job):
        _write_unfinished(out, job, shards, clips, supervised, progress)
        return finish(out, job, shards, 0.0)


def reopen_source(job: Job, place: Path | str) -> RawClips:
    """Open what a store was made from, to write shards of it again.

    Args:
        place: the folder or URL of the raw files, or the MedMNIST file.

    Raises:
        StoreError: it is something else, or this version would give other pixels.
    """
    if job.made_from["pixels_version"] != PIXELS_VERSION:
        raise StoreError(
            f"the store was made by version {job.made_from['pixels_version']} of the decoder path, "
            f"this is version {PIXELS_VERSION}",
            fix="Use the release that made it, or prepare it anew in another folder.",
        )
    reader = job.settings.reader
    if reader is not None and OutsideReader.named(reader.path).sha256 != reader.sha256:
        version = "" if reader.version is None else f" (by version {reader.version})"
        raise StoreError(
            f"the code of the reader {reader.path} has changed since the store was made{version}",
            fix="Install the code that made it, or prepare the store anew in another folder.",
        )
    if "arrays" in job.made_from:
        raise StoreError("the store was made from arrays in memory, which cannot be read again")
    if "npz" not in job.made_from:
        return open_source(place)
    path = Path(place)
    _, volumes = read_medmnist(path)
    if _digest(path) != job.made_from["npz"]:
        raise StoreError("is not the file that the store was made from", where=path)
    return volumes


def _pool(engine: Engine, workers: int | None) -> Pool:
    if engine == "ray":
        from dist_train.data.store.ray_engine import on_ray

        return partial(on_ray, workers=workers)
    return partial(supervised, workers=workers)


def _plan(
    manifest: Manifest,
    source: Source,
    out: Path,
    settings: PrepareSettings,
    part: Part | None,
    max_missing: float,
    run: Pool,
    like: Path | None,
) -> tuple[Job, Sequence[Shard]]:
    """Return the job and the shards to write, after the checks that need no decoding."""
    names = manifest.table["filename"]
    twice = source.twice(names.tolist())
    if twice is not None:
        lines = [manifest.line(int((names == name).to_numpy().argmax())) for name in twice]
        raise ManifestError(
            f"'{twice[0]}' ({lines[0]}) and '{twice[1]}' ({lines[1]}) are one file",
            fix="Each clip may be listed once.",
        )
    job = _job(manifest.table, settings, **_class_names(manifest))
    shards = job.shards(out) if part is None else part.of(job.shards(out))
    _check_missing(job, shards, source, max_missing)
    named = _class_names(manifest)
    if like is not None:
        return _job(job.table, as_in(like, settings), **named), shards
    try:
        found = settings_of(read_made_from(out))
        settings = replace(
            settings,
            bits=found.bits if settings.bits is None else settings.bits,
            black=found.black,
            white=found.white,
            channel_names=found.channel_names,
            record_version=found.record_version,
        )
    except StoreError:
        # A new folder, or one that ``write_lock`` will refuse.
        run = partial(run, limits=_limits(settings))
        settings = survey(source, list(names), settings, run)
    return _job(job.table, settings, **named), shards


def _class_names(manifest: Manifest) -> dict[str, dict[str, str]]:
    """The entry of ``job.json`` for classes with names of their own."""
    names = {str(label): name for label, name in manifest.classes.items()}
    return {} if class_names(names) == CLASSES else {"classes": names}


def _job(table: pd.DataFrame, settings: PrepareSettings, **more: Any) -> Job:
    default = PrepareSettings()
    # Stores of earlier versions have no such entries: without them the fingerprint stays.
    absent = {name for name in LATER if getattr(settings, name) == getattr(default, name)}
    absent |= {"record_version"} if settings.record_version == 1 else set()
    entries = {name: value for name, value in asdict(settings).items() if name not in absent}
    return Job.of(table, pixels_version=PIXELS_VERSION, settings=entries, **more)


def _check_missing(job: Job, shards: Sequence[Shard], source: Source, max_missing: float) -> None:
    """Refuse, before any work, a store of which too many files are missing.

    Args:
        shards: those that are written are skipped.
        max_missing: largest share of the store's clips whose files may be missing from these
            shards.

    Raises:
        StoreError: more files are missing, or all files of the store.
    """
    unwritten = [shard for shard in shards if not shard.is_written()]
    names = [name for shard in unwritten for name in job.filenames(shard)]
    missing = source.missing(names)
    if not missing:
        return
    # All files of these shards may be missing, if other shards have some.
    some = len(missing) < len(names) or any(not source.missing([n]) for n in job.table["filename"])
    if some and len(missing) <= max_missing * len(job.table):
        return
    classes = job.table["label"][job.table["filename"].isin(set(missing))].astype(str)
    hint = source.hint(missing[0])
    raise StoreError(
        f"{MISSING} ({len(missing)} of {len(names)} files are: "
        f"{by_class(count_classes(classes), job.classes)})",
        where=source.where(missing[0]),
        fix=f"{hint} The manifest must name files that are there."
        if hint
        else "Check --source; or leave them out of the manifest (--where chooses rows), or raise "
        "--max-rejected.",
    )


def _finish(
    out: Path,
    job: Job,
    shards: Sequence[Shard],
    max_rejected: float,
    publisher: Publisher | None,
) -> dict[str, Any]:
    marker = finish(out, job, shards, max_rejected)
    if publisher is not None:
        publisher.finish()
    return marker


def _digest(path: Path) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_unfinished(
    out: Path,
    job: Job,
    shards: Sequence[Shard],
    raw: RawClips,
    run: Pool,
    progress: Progress | None,
    publisher: Publisher | None = None,
) -> None:
    if publisher is not None:
        publisher.begin()
        publisher.adopt(shards)
    pending = {shard for shard in shards if not _is_finished(shard, raw)}
    stored = [shard for shard in shards if shard not in pending]
    _warn_of_changed(stored, job, raw)
    if pending:
        # A store with a marker counts as finished.
        (out / MARKER).unlink(missing_ok=True)
        if publisher is not None:
            publisher.drop_marker()
    total, done = (sum(len(job.filenames(shard)) for shard in some) for some in (shards, stored))
    if progress:
        progress(done, total)

    def new(shard: Shard) -> Task:
        if publisher is not None and shard.path.exists():
            # Its good clips are kept.
            publisher.fill(shard)
        return replace(new_task(job, shard, raw), publisher=publisher)

    tasks = (new(shard) for shard in shards if shard in pending)
    write_tasks(tasks, job, raw, run, progress, done, total)


def _is_finished(shard: Shard, raw: RawClips) -> bool:
    """Whether the shard is written, and none of its rejects could be a clip now.

    A reject could be one if its file was changed or found since, or was not fetched last time.
    """
    if not shard.is_written():
        return False
    if not isinstance(raw, Source):
        return not lost_in(shard)
    rejects = read_rejects(shard.rejects_path)
    reasons = rejects["reason"].str
    # A mount or a renamed folder brings files whose own times do not change.
    gone = (LOST, MISSING) if isinstance(raw, LocalFolder) else LOST
    absent = rejects["file"][reasons.startswith(gone)].tolist()
    if len(raw.missing(absent)) < len(absent) or reasons.startswith(UNFETCHED).any():
        return False
    written = shard.path.stat().st_mtime
    return not any(raw.changed_since(name, written) for name in rejects["file"])


def _warn_of_changed(stored: Sequence[Shard], job: Job, raw: RawClips) -> None:
    """Warn of local files that are newer than the shards with their clips, which are kept.

    Not of files elsewhere: to ask a server for half a million files takes hours.
    """
    if not isinstance(raw, LocalFolder):
        return
    changed = [
        name
        for shard in stored
        for written in [shard.path.stat().st_mtime]
        for name in job.filenames(shard)
        if raw.changed_since(name, written)
    ]
    if changed:
        log.warning(
            "%d raw files were changed or moved since their clips were stored, the first is %s: "
            "the store keeps what it has of them; prepare into another folder to read them anew",
            len(changed),
            raw.where(changed[0]),
        )


def new_task(job: Job, shard: Shard, raw: RawClips) -> Task:
    """Return the task that writes a shard. Good clips of a shard that is there are kept."""
    rows = job.rows(shard)
    kept = good_clips(shard.path, rows, job.form)
    lost = lost_in(shard)
    absent = set(raw.missing(list(lost))) if isinstance(raw, Source) else set()
    # A lost clip keeps its reason, by which a later repair knows it.
    rejected = {
        position: lost[row["filename"]]
        for position, row in enumerate(rows)
        if row["filename"] in absent and position not in kept
    }
    return Task(shard, rows, job.settings, raw_of(raw, job, shard), shard.path, kept, rejected)


def raw_of(raw: RawClips, job: Job, shard: Shard) -> RawClips:
    """Return the raw clips of a shard's rows."""
    if isinstance(raw, Source):
        return raw.narrowed(job.filenames(shard))
    return raw[job.span(shard)]


def write_tasks(
    tasks: Iterable[Task],
    job: Job,
    raw: RawClips,
    run: Pool,
    progress: Progress | None,
    done: int,
    total: int,
) -> None:
    """Write shards. Progress starts at ``done`` of ``total`` rows.

    Raises:
        StoreError: a worker was killed, or the source is gone.
        OSError: the disk is full, or cannot be written.
    """
    if isinstance(raw, Source):
        counts = run(write_task, tasks, Task.without, _limits(job.settings))
    else:
        # Volumes in memory are written in less time than it takes to send them to processes.
        counts = (write_task(task, UNWATCHED) for task in tasks)
    for count in counts:
        done += count
        if progress:
            progress(done, total)


def _limits(settings: PrepareSettings) -> Limits:
    """Limits of decoding one file. Workers may import the outside reader from now on."""
    if settings.reader is not None:
        settings.reader.check()
    return Limits(settings.clip_seconds, settings.clip_memory << 20)
