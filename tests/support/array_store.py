"""A store of arrays with channels, of any stored dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.data.store.build import prepare_arrays
from dist_train.data.table.manifest import read_manifest
from dist_train.data.types import GREY


def array_store(
    folder: Path,
    clips: Iterable[tuple[np.ndarray, dict[str, Any]]],
    channels: Sequence[str] = GREY,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write a store to ``folder`` from arrays and the columns of their rows, such as ``label``.

    ``about`` are further entries of each record, such as ``spacing``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    arrays, rows = [], []
    for number, (pixels, columns) in enumerate(clips):
        arrays.append((pixels, about or {}))
        rows.append({"filename": f"{number:04d}.npy"} | columns)
    table = folder.with_suffix(".csv")
    pd.DataFrame(rows).to_csv(table, index=False)
    prepare_arrays(read_manifest(table), arrays, folder, channels=channels, shard_clips=16)
    return folder
