"""Raw files -> store: which clips go to which shard, and who writes it.

Shard k holds rows k * n to (k + 1) * n of the manifest and depends on nothing but the manifest and
the settings. A finished shard is never written again, unless a file that it rejected was mended, so
a killed run goes on where it was.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dist_train.data.decode import (
    VIDEO_SUFFIXES,
    VOLUME_SUFFIXES,
    Video,
    Volume,
    read_volume,
    to_uint8_volume,
)
from dist_train.data.files import write_whole
from dist_train.data.index import write_index
from dist_train.data.manifest import Manifest
from dist_train.data.roi import OutlineColour, crop_to_outline
from dist_train.data.shards import Record, shard_name, write_shard
from dist_train.data.store import FORMAT, INDEX, MARKER, REJECTED, SHARDS
from dist_train.errors import DecodeError, RoiError, StoreError

# Raised whenever the same file and settings would give other pixels.
PIXELS_VERSION = 1
JOB = "job.json"
LOCK = ".lock"

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
    if not source.is_dir():
        raise StoreError("the source folder does not exist", where=source)
    missing = [name for name in manifest.table["filename"] if not (source / name).is_file()]
    if missing:
        raise StoreError(
            f"the file is missing ({len(missing)} such in the manifest)",
            where=source / missing[0],
            fix="Check --source, or take it out of the manifest.",
        )
    rows: list[Record] = [
        {str(name): value for name, value in row.items()}
        for row in manifest.table.to_dict("records")
    ]
    tasks = [
        _Task(number, rows[first : first + settings.shard_clips], settings, out, source)
        for number, first in enumerate(range(0, len(rows), settings.shard_clips))
    ]
    job = {"manifest": manifest.fingerprint, "settings": asdict(settings)}
    return _run(job, tasks, out, workers, max_rejected, progress)


def prepare_npz(
    path: Path, out: Path, *, shard_clips: int = 128, progress: Progress | None = None
) -> dict[str, Any]:
    """Store a MedMNIST 3D file, with its official split.

    The form (Yang et al., Scientific Data 2023): ``{train,val,test}_images`` uint8 [N, D, H, W] and
    ``{train,val,test}_labels`` [N, 1] of 0 and 1.

    Raises:
        StoreError: the file is not of this form, or the folder belongs to other settings.
    """
    rows, volumes = _read_medmnist(path)
    settings = PrepareSettings(roi="none", shard_clips=shard_clips)
    tasks = [
        _Task(
            number,
            rows[first : first + shard_clips],
            settings,
            out,
            volumes[first : first + shard_clips],
        )
        for number, first in enumerate(range(0, len(rows), shard_clips))
    ]
    job = {
        "npz": hashlib.sha256(path.read_bytes()).hexdigest(),
        "settings": asdict(settings),
    }
    # The volumes are in memory here: writing them takes less than handing them to processes.
    return _run(job, tasks, out, 1, 0.0, progress)


@dataclass(frozen=True)
class _Task:
    """One shard: its rows, and where the clips come from (a folder, or arrays at hand)."""

    number: int
    rows: Sequence[Record]
    settings: PrepareSettings
    out: Path
    source: Path | Sequence[Volume]

    @property
    def shard(self) -> Path:
        return self.out / SHARDS / shard_name(self.number)

    @property
    def rejects(self) -> Path:
        return self.shard.with_suffix(".rejected.csv")

    def finished(self) -> bool:
        """Whether the shard is there, and no file that it rejected was mended since."""
        if not self.shard.exists() or not self.rejects.exists():
            return False
        if not isinstance(self.source, Path):
            return True
        written = self.shard.stat().st_mtime
        # The time of the inode: a good copy that is moved or unpacked into place may well carry an
        # old modification time.
        return all(
            (self.source / name).stat().st_ctime <= written
            for name in _read_rejects(self.rejects)["file"]
        )


def _run(
    job: dict[str, Any],
    tasks: Sequence[_Task],
    out: Path,
    workers: int | None,
    max_rejected: float,
    progress: Progress | None,
) -> dict[str, Any]:
    job = {"pixels_version": PIXELS_VERSION} | job
    fingerprint = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        _claim(out, job | {"fingerprint": fingerprint})
        _write_shards(tasks, workers or len(os.sched_getaffinity(0)), progress)
        return _finish(tasks, out, fingerprint, job["settings"], max_rejected)


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """A lock that the kernel drops with its owner, however the owner ends."""
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                "another process is writing this store",
                where=out,
                fix="Wait for it, or choose another --out.",
            ) from None
        yield


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Note what the folder is for, or check that it is for this."""
    path = out / JOB
    if not path.exists():
        write_whole(path, json.dumps(job, indent=2, sort_keys=True))
        return
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # Through JSON, in which a tuple is a list.
    now: dict[str, Any] = json.loads(json.dumps(job))
    if before["fingerprint"] == now["fingerprint"]:
        return
    old, new = _flat(before), _flat(now)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    changed.remove("fingerprint")
    raise StoreError(
        f"the store was made with other settings ({', '.join(changed)} changed)",
        where=out,
        fix="Use the same settings, or choose another --out.",
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= inner if inner is not None else {prefix + name: value}
    return flat


def _write_shards(tasks: Sequence[_Task], workers: int, progress: Progress | None) -> None:
    total = sum(len(task.rows) for task in tasks)
    todo = [task for task in tasks if not task.finished()]
    if todo:
        # Readers take a store for whole when it has its marker.
        (todo[0].out / MARKER).unlink(missing_ok=True)
    done = total - sum(len(task.rows) for task in todo)
    if progress:
        progress(done, total)
    for count in _each_written(todo, workers):
        done += count
        if progress:
            progress(done, total)


def _each_written(todo: Sequence[_Task], workers: int) -> Iterator[int]:
    """Write the shards of ``todo`` and yield each one's number of rows when it is finished."""
    if workers == 1 or len(todo) < 2:
        yield from map(_write_one, todo)
        return
    # Not fork: the parent may hold threads and locks (progress bars, Arrow, OpenMP).
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_end_with_parent
    ) as pool:
        futures = [pool.submit(_write_one, task) for task in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise StoreError(
                "a worker process died (out of memory, killed, or a decoder crashed)",
                where=todo[0].out,
                fix="Run the command again: finished shards are kept.",
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this worker when its parent is killed: the lock is free then, and the next run may write
    the same shard."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_one(task: _Task) -> int:
    # Else a kill between the new list of rejects and the new shard would leave the old shard, which
    # lacks the mended clip, beside a list that does not name it.
    task.shard.unlink(missing_ok=True)
    rejects: list[tuple[str, str, int]] = []
    write_shard(task.shard, _samples(task, rejects))
    return len(task.rows)


def _samples(
    task: _Task, rejects: list[tuple[str, str, int]]
) -> Iterator[tuple[str, Volume, Record]]:
    for position, row in enumerate(task.rows):
        try:
            if isinstance(task.source, Path):
                clip, facts = _read_clip(task.source / row["filename"], task.settings)
            else:
                clip = to_uint8_volume(task.source[position], row["filename"])
                facts = {"frames_declared": clip.shape[0], "box": None}
        except (DecodeError, RoiError) as error:
            rejects.append((row["filename"], str(error), row["label"]))
            continue
        crowd = row["crowd_score"]
        record = {name: value for name, value in row.items() if name != "key"} | facts
        yield row["key"], clip, record | {"crowd_score": None if np.isnan(crowd) else crowd}
    # Written before the shard is renamed into place, so a shard that exists has its list.
    write_whole(task.rejects, _csv(rejects))


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
        clip = np.stack([frame.luma for frame in video])
    if video.truncated and settings.truncated == "reject":
        because = f": {video.stopped_by}" if video.stopped_by else ""
        raise DecodeError(
            f"the video stops after {video.frames_decoded} of {video.frames_declared} declared "
            f"frames{because}",
            where=path,
            fix="Replace the file, or prepare with --truncated keep.",
        )
    return clip, {"frames_declared": video.frames_declared, "box": box}


def _finish(
    tasks: Sequence[_Task],
    out: Path,
    fingerprint: str,
    settings: dict[str, Any],
    max_rejected: float,
) -> dict[str, Any]:
    """Gather the rejects, judge them, build the index, and write the marker last."""
    rejects = pd.concat([_read_rejects(task.rejects) for task in tasks])
    write_whole(out / REJECTED, rejects.to_csv(index=False))
    total = sum(len(task.rows) for task in tasks)
    if len(rejects) / total > max_rejected or len(rejects) == total:
        (out / MARKER).unlink(missing_ok=True)
        raise StoreError(
            f"{len(rejects)} of {total} clips were rejected, and --max-rejected is "
            f"{max_rejected:g}; the first: {rejects['reason'].iloc[0]}",
            where=out / REJECTED,
            fix="Mend or remove the files, or raise --max-rejected: finished work is kept.",
        )
    if (out / MARKER).exists() and (out / INDEX).exists():
        marker: dict[str, Any] = json.loads((out / MARKER).read_text(encoding="utf-8"))
        return marker
    clips = write_index(out / INDEX, [task.shard for task in tasks])
    marker = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": settings,
        "clips": clips,
        "shards": len(tasks),
        "rejected": {str(k): int(v) for k, v in rejects["class"].value_counts().items()},
    }
    write_whole(out / MARKER, json.dumps(marker, indent=2, sort_keys=True))
    return marker


def _read_rejects(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _csv(rejects: Sequence[tuple[str, str, int]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "reason", "class"))
    writer.writerows(rejects)
    return text.getvalue()


def _read_medmnist(path: Path) -> tuple[list[Record], list[Volume]]:
    rows: list[Record] = []
    volumes: list[Volume] = []
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an npz archive")
        with np.load(path, allow_pickle=False) as arrays:
            for split in ("train", "val", "test"):
                labels = arrays[f"{split}_labels"].reshape(-1)
                images = arrays[f"{split}_images"]
                if len(labels) != len(images):
                    raise ValueError(f"{split} has {len(images)} images, {len(labels)} labels")
                for number, (label, image) in enumerate(zip(labels, images, strict=True)):
                    if label not in (0, 1):
                        raise ValueError(f"label {label} of {split} image {number} is not 0 or 1")
                    name = f"{split}_{number:05d}"
                    rows.append(
                        {
                            "key": name,
                            "filename": f"{path.name}/{name}",
                            "label": int(label),
                            "group": "",
                            "weight": 1.0,
                            "split": split,
                            "crowd_score": float("nan"),
                            "tier1": True,
                        }
                    )
                    volumes.append(image)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(
            f"is not a MedMNIST file ({error})",
            where=path,
            fix="It needs {train,val,test}_images and {train,val,test}_labels.",
        ) from None
    return rows, volumes
