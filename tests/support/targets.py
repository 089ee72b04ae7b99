"""Tiny stores whose clips show what is to be predicted, for each kind of target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from helpers import tiny_config

from dist_train.config import Config
from dist_train.data.store.build import prepare_arrays, prepare_npz
from dist_train.data.table.manifest import read_manifest

#: Clips of each split.
SPLITS = {"train": 48, "val": 18, "test": 6}


def table_store(folder: Path, columns: Mapping[str, np.ndarray], *, labelled: bool = True) -> Path:
    """A store of 72 clips of 4 to 6 frames. The brightness of a clip grows with the first column's
    place in order; each further column brightens one half of the frame."""
    random, arrays, rows = np.random.default_rng(0), [], []
    places = [np.unique(values, return_inverse=True)[1] for values in columns.values()]
    splits = np.repeat(list(SPLITS), list(SPLITS.values()))
    for number, split in enumerate(splits):
        clip = random.integers(0, 40, (random.integers(4, 7), 16, 16), dtype=np.uint8)
        for column, place in enumerate(places):
            part = clip if len(places) == 1 else np.split(clip, 2, axis=2)[column]
            part += np.uint8(180 * place[number] // max(place.max(), 1))
        row = {name: values[number] for name, values in columns.items()}
        arrays.append((clip, {}))
        rows.append({"filename": f"{number:03d}.npy", "split": split} | row)
    folder.parent.mkdir(parents=True, exist_ok=True)
    table = folder.with_suffix(".csv")
    pd.DataFrame(rows).to_csv(table, index=False)
    prepare_arrays(read_manifest(table, unlabelled=not labelled), arrays, folder, shard_clips=16)
    return folder


def multiclass_npz(path: Path, classes: int = 3) -> Path:
    """A file in MedMNIST's form, of more than two classes, told by brightness."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in SPLITS.items():
        labels = random.permutation(np.arange(count) % classes)
        images = random.integers(0, 40, (count, 6, 16, 16), dtype=np.uint8)
        images += (labels * (180 // (classes - 1))).astype(np.uint8)[:, None, None, None]
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(path, **arrays)
    return path


def target_store(folder: Path, kind: str) -> Path:
    """A store for a kind of target; ``SETTINGS`` has the settings that belong to it."""
    random, count = np.random.default_rng(1), sum(SPLITS.values())
    if kind == "npz":
        prepare_npz(multiclass_npz(folder.with_suffix(".npz")), folder)
        return folder
    if kind in ("multiclass", "ordinal"):
        names = np.array(["flowing", "slowed", "stalled"])
        return table_store(folder, {"label": names[np.arange(count) % 3]})
    if kind == "multilabel":
        both = {name: np.arange(count) // n % 2 for n, name in ((1, "left"), (2, "right"))}
        return table_store(folder, both, labelled=False)
    values = {
        name: random.permutation(count) * unit for name, unit in (("speed", 10.0), ("b", 0.1))
    }
    return table_store(folder, values, labelled=False)


SETTINGS = {
    "npz": ("plan.batch=9",),
    "multiclass": ("plan.batch=9",),
    "ordinal": ("plan.batch=9", "target.kind=ordinal", "target.classes=[flowing, slowed, stalled]"),
    "multilabel": ("target.kind=multilabel", "target.columns=[left, right]"),
    "regression": ("target.kind=regression", "target.columns=[speed, b]"),
}


def target_config(store: Path, out: Path, kind: str, *more: str) -> Config:
    """Settings of a short run: 3 epochs, with a checkpoint every 4 steps."""
    return tiny_config(store, out, "optim.lr=0.02", *SETTINGS[kind], *more)
