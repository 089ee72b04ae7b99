"""A store of clips that a test makes itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.table.manifest import read_manifest


def npy_store(folder: Path, clips: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> Path:
    """Prepare a store below ``folder`` from pixels, uint8 [D, H, W], and the columns of the table
    of clips, such as ``label``."""
    raw = folder / "raw"
    raw.mkdir()
    rows = []
    for number, (pixels, columns) in enumerate(clips):
        np.save(raw / f"{number:04d}.npy", pixels)
        rows.append({"filename": f"{number:04d}.npy"} | columns)
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    manifest = read_manifest(folder / "clips.csv")
    prepare(manifest, raw, folder / "store", PrepareSettings(roi="none"), workers=1)
    return folder / "store"
