"""What worker processes do: write one shard.

Workers import this module at their start, so it stays light: no pandas, no remote sources.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.data.raw.axes import plain_stack
from dist_train.data.raw.clip import PrepareSettings, decoding, read_clip, to_clip, values_of
from dist_train.data.raw.source import Source, split_dataset
from dist_train.data.store.salvage import read_good
from dist_train.data.store.shards import Shard, to_record, write_shard
from dist_train.data.types import DTYPES, GREY, Record, Volume
from dist_train.errors import DecodeError, RoiError
from dist_train.files import write_whole
from dist_train.safe_text import without_content
from dist_train.system.supervised_pool import Steps

if TYPE_CHECKING:
    from dist_train.data.store.publish import Publisher

# An array, or a pair of an array and further entries of its record.
RawArray = Volume | tuple[Volume, Record]
# Files by name, or an array for each row of the manifest.
RawClips = Source | Sequence[RawArray]


@dataclass(frozen=True)
class Task:
    """A shard to write, the settings, and the source of each of its clips.

    Attributes:
        rows: of the manifest.
        raw: files, or an array for each row.
        old: an earlier version of the shard.
        kept: by position, records of rows whose clips are copied from ``old`` (see ``good_clips``).
        rejected: by position, reasons of rows that are rejected without reading their files.
        publisher: uploads the shard, if the store is behind a URL.
    """

    shard: Shard
    rows: Sequence[Record]
    settings: PrepareSettings
    raw: RawClips
    old: Path
    kept: Mapping[int, Record] = field(default_factory=dict)
    rejected: Mapping[int, str] = field(default_factory=dict)
    publisher: Publisher | None = None

    def without(self, position: int, reason: str) -> Task:
        """The same task without a file that crashes the decoder."""
        reason = f"{reason}. Look at it, or remove it."
        return replace(self, rejected={**self.rejected, position: reason})


def write_task(task: Task, steps: Steps) -> int:
    """Write a shard and then its list of rejects; returns the number of its rows.

    A step is the decoding of one row's file. A shard without a list counts as not written.
    """
    rejects: list[tuple[str, str, int]] = []
    write_shard(task.shard.path, _samples(task, steps, rejects))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "reason", "class"))
    writer.writerows(rejects)
    if task.publisher is not None:
        task.publisher.put_shard(task.shard, text.getvalue())
    write_whole(task.shard.rejects_path, text.getvalue())
    return len(task.rows)


def _samples(
    task: Task, steps: Steps, rejects: list[tuple[str, str, int]]
) -> Iterator[tuple[str, Volume, Record]]:
    for position, row in enumerate(task.rows):
        try:
            clip, record = _read(task, steps, position)
        except (DecodeError, RoiError) as error:
            rejects.append((row["filename"], without_content(error.reason), row["label"]))
            continue
        yield row["key"], clip, to_record(row) | record
        # Free it before the next clip is read.
        del clip
    # Only now, just before the new shard is renamed into place: a failure before it leaves the old
    # shard with its list, and no kill after it leaves a new shard with an old list.
    task.shard.rejects_path.unlink(missing_ok=True)


def _read(task: Task, steps: Steps, position: int) -> tuple[Volume, Record]:
    """Return the clip of a row, and what its record holds beyond the manifest.

    Raises:
        DecodeError, RoiError: the file is rejected.
    """
    if position in task.kept:
        record = task.kept[position]
        return read_good(task.old, record), record
    if position in task.rejected:
        raise DecodeError(task.rejected[position])
    name = task.rows[position]["filename"]
    if not isinstance(task.raw, Source):
        raw = task.raw[position]
        clip, more = raw if isinstance(raw, tuple) else (raw, {})
        record = {"frames_declared": clip.shape[0], "box": None}
        if (task.settings.store_dtype, task.settings.channel_names) == ("uint8", GREY):
            with decoding(name):
                clip, record = to_clip(values_of(plain_stack(clip), task.settings), task.settings)
        _check(clip, task.settings)
        return clip, record | more
    with task.raw.fetched(name) as path, steps.at(position):
        clip, record = read_clip(path, name, task.raw.where(name), task.settings)
        # Of a file with several clips the size tells nothing of one.
        if task.settings.record_version > 1 and not split_dataset(name)[1]:
            record |= {"file_bytes": _size_of(path)}
    _check(clip, task.settings)
    return clip, record


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _check(clip: Volume, settings: PrepareSettings) -> None:
    """Raise DecodeError unless a clip has the store's dtype and channels."""
    names = settings.channel_names
    if clip.ndim != (4 if len(names) > 1 else 3) or (
        clip.ndim == 4 and clip.shape[3] != len(names)
    ):
        raise DecodeError(
            f"has shape {list(clip.shape)}, and the store {len(names)} channels "
            f"({', '.join(names)})"
        )
    if clip.dtype != DTYPES[settings.store_dtype]:
        raise DecodeError(f"is {clip.dtype}, and the store {settings.store_dtype}")
    if clip.dtype.kind == "f" and not (clip.min() >= 0 and clip.max() <= 1):
        raise DecodeError("has values that are not from 0 to 1")
