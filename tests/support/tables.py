"""Clip tables of tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dist_train.config import TargetSettings
from dist_train.data.store.clip_table import ClipTable
from dist_train.data.target_labels import TargetLabels, target_labels
from dist_train.data.types import CLASSES, DTYPES

DEFAULTS = {
    "key": "clip", "filename": "a.npy", "group": "", "split": "", "label": 0, "weight": 1.0,
    "crowd_score": np.nan, "tier1": True, "frames": 1, "height": 1, "width": 1, "shard": 0,
    "offset": 0, "crc32c": 0,
}  # fmt: skip


def table_of(frame: pd.DataFrame) -> ClipTable:
    """A clip table in memory: the rows of a frame, with defaults for missing columns."""
    full = frame.assign(**{name: v for name, v in DEFAULTS.items() if name not in frame})
    records = []
    for row in full.astype(object).to_dict("records"):
        record = {
            str(name): getattr(value, "item", lambda v=value: v)() for name, value in row.items()
        }
        record["shape"] = [record[name] for name in ("frames", "height", "width")]
        records.append((row["key"], record))
    classes = max(2, 1 + int(full["label"].max()))
    return ClipTable.of(records, 1, (DTYPES["uint8"], 1), classes)


def two_classes(table: ClipTable, classes: Mapping[int, str] = CLASSES) -> TargetLabels:
    """The label column of a table, as that of a binary target."""
    return target_labels(TargetSettings(), table, classes)
