"""The run's own record of splits, and how a store differs from the one of the training.

``splits.csv`` is written when a run begins: the key of each clip of the store, its label, its split
(empty if the clip takes no part) and the CRC-32C of its pixels. Later commands use it, so that no
clip of the training ever counts as held out. A large store's run has ``splits.npy`` instead: the
code of each clip's split, uint8 [clips].
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dist_train.data.splits import CODES, NAMES, Splits
from dist_train.data.store.clip_table import ClipTable
from dist_train.errors import FileError, RunError
from dist_train.files import crc32c, read_plain, reason_of

SPLITS = "splits.csv"
LARGE_SPLITS = "splits.npy"
COLUMNS = ["key", "label", "split", "crc32c"]
#: Clips from which a run has ``splits.npy``.
LARGE = 2**23
MOST_BYTES = 2**31


class RunSplits(NamedTuple):
    """What a run knows of the clips of its store, in the store's order.

    Attributes:
        codes: the split of each clip, see ``data.splits``.
        table: key, label, split and crc32c of each; None of a large store.
    """

    codes: Splits
    table: pd.DataFrame | None


def splits_file(table: ClipTable, splits: Splits) -> tuple[str, bytes]:
    """Name and content of the run's record of splits.

    Args:
        table: the store's table.
        splits: the split of each of its clips.
    """
    if len(table) < LARGE:
        names = np.array(NAMES, object)[splits]
        frame = table.frame(columns=["key", "label", "crc32c"]).assign(split=names)
        return SPLITS, frame[COLUMNS].to_csv(index=False).encode()
    content = io.BytesIO()
    np.save(content, splits)
    return LARGE_SPLITS, content.getvalue()


def splits_record(name: str, content: bytes) -> dict[str, Any]:
    """What ``run.json`` says of the record of splits."""
    record: dict[str, Any] = {"crc32c": crc32c(content)}
    return record if name == SPLITS else record | {"file": name}


def read_splits(run: Path, facts: dict[str, Any]) -> RunSplits | None:
    """The run's record of splits; None if the file is missing.

    Args:
        facts: what ``run.json`` says of it.

    Raises:
        RunError: it cannot be read, or was edited.
    """
    name = LARGE_SPLITS if facts.get("file") == LARGE_SPLITS else SPLITS
    path = run / name
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
    if name == LARGE_SPLITS:
        return RunSplits(np.load(io.BytesIO(content), allow_pickle=False), None)
    table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    codes = table["split"].map(CODES).fillna(0).to_numpy().astype(np.uint8)
    return RunSplits(codes, table.astype({"label": np.int64, "crc32c": np.int64}))


def what_changed(then: RunSplits | None, now: ClipTable, clips_then: int) -> str:
    """How a store differs from the one of a run, in words.

    Args:
        then: the run's record of splits, if it can be read.
        now: the store's table.
        clips_then: how many clips the run's store had.
    """
    counts = f"{clips_then} clips then, {len(now)} now"
    if then is None or then.table is None:
        return counts
    table = then.table
    both = table.merge(
        now.frame(columns=["key", "label", "crc32c"]), on="key", suffixes=("", "_now")
    )
    labels = int((both["label"] != both["label_now"]).sum())
    pixels = int((both["crc32c"] != both["crc32c_now"]).sum())
    return (
        f"{counts}; {len(now) - len(both)} new, {len(table) - len(both)} gone, "
        f"{labels} with another label, {pixels} with other pixels"
    )
