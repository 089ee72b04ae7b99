"""Lists of rejects: the files that gave no clip, and why. Each shard has one, and the store."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from dist_train.data.store.shards import Shard
from dist_train.data.types import LABEL, class_names
from dist_train.errors import FileError, StoreError
from dist_train.files import read_plain
from dist_train.safe_text import for_spreadsheet

# Longest list in bytes.
MOST_REJECTS = 1 << 30
# Begins the reason of a reject that was a clip once. The checksum of its pixels follows, if known.
LOST = "lost: it was damaged in the store, and its raw file was not at hand"


def read_rejects(path: Path) -> pd.DataFrame:
    """Read the list of a shard or of the store: columns ``file``, ``reason``, ``class``, all text.

    Raises:
        StoreError: the list is missing or damaged.
    """
    try:
        content = read_plain(path, most_bytes=MOST_REJECTS)
        rows = list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True))
        if not rows or rows[0] != ["file", "reason", "class"]:
            raise ValueError("its columns are not file, reason, class")
        if any(len(row) != 3 or not re.fullmatch(LABEL, row[2]) for row in rows[1:]):
            raise ValueError("a row is not a file, a reason and a class")
    except (FileError, ValueError, csv.Error) as error:
        what = error.what if isinstance(error, FileError) else f"cannot be read ({error})"
        raise StoreError(
            f"the list of rejects {what}",
            where=path,
            fix="Run 'dist-train verify' with --repair.",
        ) from None
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=str)


def lost_in(shard: Shard) -> dict[str, str]:
    """Reasons of rejects that were clips once, by file; none if the shard's list cannot be read."""
    try:
        rejects = read_rejects(shard.rejects_path)
    except StoreError:
        return {}
    lost = rejects[rejects["reason"].str.startswith(LOST)]
    return dict(zip(lost["file"], lost["reason"], strict=True))


def gather_rejects(shards: Sequence[Shard]) -> pd.DataFrame:
    """Join the lists of all shards, in the order of the manifest."""
    return pd.concat([read_rejects(shard.rejects_path) for shard in shards])


def rejects_csv(rejects: pd.DataFrame) -> str:
    """Return the text of the store's list, whose names are safe to open in a spreadsheet."""
    text: str = rejects.assign(file=rejects["file"].map(for_spreadsheet)).to_csv(index=False)
    return text


def count_classes(classes: pd.Series) -> dict[str, int]:
    """Number of rows by class: "0", "1" and so on, or "-1" where it is not known."""
    return {str(k): int(v) for k, v in classes.value_counts().items()}


def by_class(counts: Mapping[str, int], classes: Mapping[str, str] | None) -> str:
    """Counts by class, in words; for ``classes`` see ``class_names``."""
    named = ((str(label), name) for label, name in class_names(classes).items())
    return ", ".join(f"{counts[label]} {name}" for label, name in named if label in counts)
