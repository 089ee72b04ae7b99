"""Small stores, and what tests look at in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from make_media import write_manifest

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import REJECTED, SHARDS

WHOLE = PrepareSettings(roi="none", shard_clips=4)


def make(folder: Path, names: Sequence[str], out: str = "store", **how: object) -> Path:
    """Prepare the files ``names`` of ``folder``/raw; returns the store's folder."""
    manifest = write_manifest(folder / "clips.csv", names)
    settings = how.pop("settings", WHOLE)
    how.setdefault("workers", 1)
    prepare(manifest, folder / "raw", folder / out, settings, **how)  # type: ignore[arg-type]
    return folder / out


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every written shard."""
    lists = (store / SHARDS).glob("*.rejected.csv")
    shards = [path.with_name(path.name.replace("rejected.csv", "tar")) for path in lists]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


def rejected(store: Path) -> dict[str, str]:
    """Reasons of the store's rejects, by file."""
    table = pd.read_csv(store / REJECTED, dtype=str)
    return dict(zip(table["file"], table["reason"], strict=True))


def small_medmnist(path: Path, **changed: np.ndarray | None) -> Path:
    """A MedMNIST file of ten clips; arrays may be given, or left out as None."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {}
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 4, 5, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path
