"""What a store records of its clips, as columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dist_train.data.store.index import read_index
from dist_train.data.store.reader import Store
from dist_train.data.types import Record

#: Prefix of the columns of the clip table that the store keeps as metadata.
_METADATA = "metadata "
# Not tried as leaks: they tell of the label, not of the recording.
_OF_THE_LABEL = ("crowd_score", "tier1", "weight")


def recorded(store: Store) -> pd.DataFrame:
    """What the index holds of each clip; the position of a row is the number of the clip.

    Columns: ``filename``, ``label``, ``group``, ``depth``, ``height``, ``width``, ``bytes`` (of the
    stored pixels), ``file_bytes`` (of the raw file, NaN if not recorded), ``interval`` (seconds
    between frames, NaN if unknown), ``declared`` (frames; 0 if unknown), ``damaged`` (frames),
    ``shard``, ``offset``, and the clip table's further columns.
    """
    return pd.DataFrame([_row(record) for _, record in read_index(store.index())])


def _row(record: Record) -> dict[str, Any]:
    depth, height, width = record["shape"][:3]
    metadata = record.get("metadata") or {}
    return {
        **{name: record[name] for name in ("filename", "label", "group", "shard", "offset")},
        "depth": depth,
        "height": height,
        "width": width,
        "bytes": record["length"],
        "file_bytes": record.get("file_bytes", np.nan),
        "interval": record.get("interval") or np.nan,
        "declared": record.get("frames_declared", 0),
        "damaged": record.get("frames_damaged", 0),
        **{_METADATA + name: value for name, value in metadata.items()},
    }


def describing(clips: pd.DataFrame) -> pd.DataFrame:
    """The columns that describe how a clip was recorded, for ``find_leaks``."""
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
        if name.startswith(_METADATA) and name.removeprefix(_METADATA) not in _OF_THE_LABEL:
            own = name.removeprefix(_METADATA)
            columns[own if own not in columns else f"{own} (table)"] = _numbers(clips[name])
    return columns


def _numbers(column: pd.Series) -> pd.Series:
    """The column as numbers if all of its values are; else as texts, "" where one is missing."""
    texts = column.fillna("").astype(str).str.strip()
    numbers = pd.to_numeric(texts, errors="coerce")
    return texts if (numbers.isna() & (texts != "")).any() else numbers
