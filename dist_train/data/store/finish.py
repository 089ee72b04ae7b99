"""Written shards -> finished store: the list of rejects, the index, the clip table, and
the marker last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dist_train.data.store.build_spec import Job
from dist_train.data.store.clip_table import TABLE, ClipTable, write_table
from dist_train.data.store.index import index_checksum, read_index, write_index
from dist_train.data.store.reader import (
    FORMAT,
    INDEX,
    MARKER,
    REJECTED,
    content_of,
    read_marker,
)
from dist_train.data.store.rejects import by_class, count_classes, gather_rejects, rejects_csv
from dist_train.data.store.shards import Shard
from dist_train.data.types import GREY
from dist_train.errors import StoreError
from dist_train.files import sealed, write_whole


def finish(out: Path, job: Job, shards: Sequence[Shard], max_rejected: float) -> dict[str, Any]:
    """Gather and count the rejects, build the index, and write the marker last.

    Returns:
        The content of ``store.json``.

    Raises:
        StoreError: too many clips were rejected, or a shard does not hold what it should.
    """
    rejects = gather_rejects(shards)
    write_whole(out / REJECTED, rejects_csv(rejects))
    total = len(job.table)
    if len(rejects) / total > max_rejected or len(rejects) == total:
        # An existing marker stays: the store was finished with a larger --max-rejected.
        raise StoreError(
            f"{len(rejects)} of {total} clips were rejected "
            f"({by_class(count_classes(rejects['class']), job.classes)}), and --max-rejected is "
            f"{max_rejected:g}; the first: {rejects['file'].iloc[0]}: "
            f"{rejects['reason'].iloc[0].rstrip('.')}",
            where=out / REJECTED,
            fix="Mend or remove the files, or raise --max-rejected: finished work is kept.",
        )
    before = _valid_marker(out, job, shards, rejects)
    if before is not None:
        return before
    clips = write_index(out / INDEX, [shard.path for shard in shards])
    if clips != total - len(rejects):
        raise StoreError(
            f"the shards hold {clips} clips, not the {total - len(rejects)} that were written",
            where=out,
            fix="Run 'dist-train verify' with --repair, which rebuilds the damaged ones.",
        )
    records, classes = read_index(out / INDEX), len(job.classes or "01")
    checksum = write_table(out / TABLE, records, len(shards), job.form, classes)
    content = content_of(ClipTable.open(out / TABLE, checksum, clips))
    marker = marker_of(job, shards, rejects, index_checksum(out / INDEX), content, checksum)
    write_whole(out / MARKER, sealed(marker))
    return marker


def _valid_marker(
    out: Path, job: Job, shards: Sequence[Shard], rejects: pd.DataFrame
) -> dict[str, Any] | None:
    """Return the existing marker, if it, the index and the table belong to these shards."""
    try:
        marker = read_marker(out)
        checksum = index_checksum(out / INDEX)
        ClipTable.open(out / TABLE, marker["table_crc32c"], marker["clips"]).check()
    except (StoreError, KeyError):
        return None
    content, table = marker.get("content"), marker["table_crc32c"]
    expected = marker_of(job, shards, rejects, checksum, content, table)
    return marker if marker == expected else None


def marker_of(
    job: Job,
    shards: Sequence[Shard],
    rejects: pd.DataFrame,
    index_crc32c: int,
    content: str | None,
    table_crc32c: int | None,
) -> dict[str, Any]:
    """Return the content of ``store.json``; the last two are None in stores of earlier versions."""
    marker = {
        "format": FORMAT,
        "fingerprint": job.fingerprint,
        "settings": job.made_from["settings"],
        "clips": len(job.table) - len(rejects),
        "shards": len(shards),
        "rejected": count_classes(rejects["class"]),
        "index_crc32c": index_crc32c,
    }
    # Stores of earlier versions have none of these.
    if job.settings.channel_names != GREY:
        marker["channels"] = list(job.settings.channel_names)
    if job.settings.store_dtype != "uint8":
        marker["dtype"] = job.settings.store_dtype
    if job.classes is not None:
        marker["classes"] = job.classes
    later = {"content": content, "table_crc32c": table_crc32c}
    return marker | {name: value for name, value in later.items() if value is not None}
