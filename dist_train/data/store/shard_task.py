"""A shard to write, and the writing of it: what worker processes do.

They import this module at their start, so it stays light: no pandas, no remote places.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.source import Source
from dist_train.data.raw.volume_file import to_uint8_volume
from dist_train.data.store.salvage import facts_of, read_good
from dist_train.data.store.shards import Shard, to_record, write_shard
from dist_train.data.types import Record, Volume
from dist_train.errors import DecodeError, RoiError
from dist_train.files import write_whole
from dist_train.safe_text import without_content
from dist_train.system.supervised_pool import Steps


@dataclass(frozen=True)
class Task:
    """A shard, its rows of the manifest, and where its clips come from: files, or arrays at hand.

    ``condemned``: positions of rows whose file took its process along, and how. ``kept``: clips
    that are taken from the shard at ``old``, by position, as ``good_clips`` gives them.
    ``settled``: reasons of rows that are rejected unread.
    """

    shard: Shard
    rows: Sequence[Record]
    settings: PrepareSettings
    source: Source | Sequence[Volume]
    condemned: Mapping[int, str] = field(default_factory=dict)
    old: Path | None = None
    kept: Mapping[int, Record] = field(default_factory=dict)
    settled: Mapping[int, str] = field(default_factory=dict)

    def without(self, position: int, reason: str) -> Task:
        """The same, with a row's file rejected unread."""
        return replace(self, condemned={**self.condemned, position: reason})


def write_task(task: Task, steps: Steps) -> int:
    """Write one shard and its list of rejects, anew if they are there; returns its rows' number.

    A step is the decoding of one row's file. A shard that is there stays until the new one is whole
    and takes its place.
    """
    rejects: list[tuple[str, str, int]] = []
    anew = os.path.lexists(task.shard.path)
    write_shard(task.shard.path, _samples(task, steps, rejects, anew))
    if anew:
        write_whole(task.shard.rejects_path, _csv(rejects))
    return len(task.rows)


def _samples(
    task: Task, steps: Steps, rejects: list[tuple[str, str, int]], anew: bool
) -> Iterator[tuple[str, Volume, Record]]:
    for position, row in enumerate(task.rows):
        if position in task.settled:
            rejects.append((row["filename"], task.settled[position], row["label"]))
            continue
        try:
            clip, facts = _read(task, steps, position)
        except (DecodeError, RoiError) as error:
            rejects.append((row["filename"], without_content(error.reason), row["label"]))
            continue
        yield row["key"], clip, to_record(row) | facts
        # Not beside the next one.
        del clip
    if anew:
        # The old list must not stand beside the new shard, nor the new one beside the old shard: a
        # kill leaves a shard without a list, which counts as not written.
        task.shard.rejects_path.unlink(missing_ok=True)
    else:
        # Written before the shard is renamed into place, so a shard that exists has its list.
        write_whole(task.shard.rejects_path, _csv(rejects))


def _read(task: Task, steps: Steps, position: int) -> tuple[Volume, Record]:
    name = task.rows[position]["filename"]
    if position in task.kept:
        assert task.old is not None
        record = task.kept[position]
        return read_good(task.old, record), facts_of(record, task.rows[position])
    if not isinstance(task.source, Source):
        clip = to_uint8_volume(task.source[position], name)
        return clip, {"frames_declared": clip.shape[0], "box": None}
    where = task.source.where(name)
    if position in task.condemned:
        raise DecodeError(task.condemned[position], where=where, fix="Look at it, or remove it.")
    with task.source.fetched(name) as path, steps.at(position):
        return read_clip(path, name, where, task.settings)


def _csv(rejects: Sequence[tuple[str, str, int]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "reason", "class"))
    writer.writerows(rejects)
    return text.getvalue()
