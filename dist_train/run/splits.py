"""The run's own table of splits, and how a store differs from the one of the training.

``splits.csv`` is written when a run begins: the key of each clip of the store, its label, its split
(empty if the clip takes no part) and the CRC-32C of its pixels. Later commands use it, so that no
clip of the training ever counts as held out.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.errors import FileError, RunError
from dist_train.files import crc32c, read_plain, reason_of

SPLITS = "splits.csv"
COLUMNS = ["key", "label", "split", "crc32c"]
#: Some ten million clips.
MOST_BYTES = 2**30


def splits_text(table: pd.DataFrame, clips: pd.DataFrame) -> str:
    """The content of ``splits.csv``.

    Args:
        table: the store's table.
        clips: the rows of it that take part, with ``split`` filled in.
    """
    split = clips["split"].reindex(table.index).fillna("")
    return str(table.assign(split=split)[COLUMNS].to_csv(index=False))


def splits_record(text: str) -> dict[str, Any]:
    """What ``run.json`` says of a ``splits.csv`` with this text."""
    return {"crc32c": crc32c(text.encode())}


def read_splits(run: Path, facts: dict[str, Any]) -> pd.DataFrame | None:
    """The run's table of splits, in the order of the store; None if the file is missing.

    Args:
        facts: what ``run.json`` says of it.

    Raises:
        RunError: it cannot be read, or was edited.
    """
    path = run / SPLITS
    if not os.path.lexists(path):
        return None
    try:
        content = read_plain(path, most_bytes=MOST_BYTES)
        if crc32c(content) != facts["crc32c"]:
            raise ValueError("it is not as it was written")
    except (FileError, ValueError) as error:
        raise RunError(
            f"the run's table of splits cannot be used ({reason_of(error)})",
            where=path,
            fix="Restore it from a copy, or delete it: it is made again from the store, if that "
            "is still the same.",
        ) from None
    table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    return table.astype({"label": np.int64, "crc32c": np.int64})


def what_changed(then: pd.DataFrame | None, now: pd.DataFrame, clips_then: int) -> str:
    """How a store differs from the one of a run, in words.

    Args:
        then: the run's table of splits, if it can be read.
        now: the store's table.
        clips_then: how many clips the run's store had.
    """
    counts = f"{clips_then} clips then, {len(now)} now"
    if then is None:
        return counts
    both = then.merge(now[["key", "label", "crc32c"]], on="key", suffixes=("", "_now"))
    labels = int((both["label"] != both["label_now"]).sum())
    pixels = int((both["crc32c"] != both["crc32c_now"]).sum())
    return (
        f"{counts}; {len(now) - len(both)} new, {len(then) - len(both)} gone, "
        f"{labels} with another label, {pixels} with other pixels"
    )
