"""Which shards of a job are still to be written, and the task of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pydantic import TypeAdapter

from dist_train.data.clip import PrepareSettings
from dist_train.data.job import Job, lost_of, read_rejects
from dist_train.data.salvage import good_clips
from dist_train.data.shard_files import Shard
from dist_train.data.source import MISSING, UNFETCHED, LocalFolder, Source
from dist_train.data.task import Task
from dist_train.data.types import Volume


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
