"""What a store records of its clips, as columns."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from dist_train.data.store.index import read_index
from dist_train.data.store.reader import Store
from dist_train.data.types import METADATA

# Not tried as a leak: the clip's own class of several, which the label is made of.
_OF_THE_LABEL = ("class",)


def recorded(store: Store) -> pd.DataFrame:
    """What the index holds of each clip; the position of a row is the number of the clip.

    Columns: ``filename``, ``label``, ``group``, ``depth``, ``height``, ``width``, ``bytes`` (of the
    stored pixels), ``file_bytes`` (of the raw file, NaN if not recorded), ``interval`` (seconds
    between frames, NaN if unknown), ``declared`` (frames; 0 if unknown), ``damaged`` (frames),
    ``shard``, ``offset``, and the clip table's further columns.
    """
    table = store.table
    names = ["filename", "label", "group", "shard", "offset", "frames", "height", "width"]
    clips = table.frame(columns=[*names, *table.metadata]).rename(columns={"frames": "depth"})
    pixels = clips["depth"] * clips["height"] * clips["width"]
    # What the clip table does not have.
    more = [
        (
            record.get("file_bytes", np.nan),
            record.get("frames_declared", 0),
            record.get("frames_damaged", 0),
        )
        for _, record in read_index(store.index())
    ]
    own = pd.DataFrame(more, columns=["file_bytes", "declared", "damaged"], index=clips.index)
    return clips.assign(
        bytes=pixels * len(store.channels) * store.dtype.itemsize,
        interval=table.sampling("interval"),
    ).join(own)


def describing(clips: pd.DataFrame, besides: Iterable[str] = ()) -> pd.DataFrame:
    """The columns that describe how a clip was recorded, for ``find_leaks``.

    Args:
        clips: rows of ``recorded``.
        besides: columns of metadata to leave out, as those that labels come from.
    """
    of_the_label = {*_OF_THE_LABEL, *besides}
    columns = clips[["depth", "height", "width"]].copy()
    if clips["file_bytes"].notna().all():
        columns["bytes (file)"] = clips["file_bytes"]
    else:
        columns["bytes (stored)"] = clips["bytes"]
    if (clips["group"] != "").any():
        columns["group"] = clips["group"]
    if clips["interval"].notna().any():
        columns["interval"] = clips["interval"]
    for name in map(str, clips):
        if name.startswith(METADATA) and name.removeprefix(METADATA) not in of_the_label:
            own = name.removeprefix(METADATA)
            columns[own if own not in columns else f"{own} (table)"] = _numbers(clips[name])
    return columns


def _numbers(column: pd.Series) -> pd.Series:
    """The column as numbers if all of its values are; else as texts, "" where one is missing."""
    texts = column.fillna("").astype(str).str.strip()
    numbers = pd.to_numeric(texts, errors="coerce")
    return texts if (numbers.isna() & (texts != "")).any() else numbers
