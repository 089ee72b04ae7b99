"""MedMNIST 3D files (Yang et al., Scientific Data 2023) -> manifest rows and volumes.

A file holds ``{train,val,test}_images`` uint8 [N, D, H, W] and ``{train,val,test}_labels`` [N, 1],
which are class codes from 0.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.data.raw.formats.npy import read_npy
from dist_train.data.table.manifest import SPLITS, check_text
from dist_train.data.types import MOST_CLASSES, Volume
from dist_train.errors import StoreError
from dist_train.files import open_plain, reason_of
from dist_train.system.advice import blame_machine
from dist_train.system.cgroup import usable_memory


def read_medmnist(path: Path) -> tuple[pd.DataFrame, list[Volume]]:
    """Return the clip table (see ``Manifest``), with the official split, and a volume for each row.

    Raises:
        StoreError: the file has another form.
        ManifestError: the file's name, which becomes a part of the clips' names, is not UTF-8.
    """
    check_text(path.name, path)
    rows: list[dict[str, Any]] = []
    volumes: list[Volume] = []
    try:
        with open_plain(path) as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not an npz archive")
            archive = zipfile.ZipFile(file)
            # A small archive may unpack to a thousand times its size.
            needed = sum(member.file_size for member in archive.infolist())
            if needed > usable_memory():
                raise ValueError(f"it unpacks to {needed} bytes, more than there is memory")
            for split in SPLITS:
                labels = _array(archive, f"{split}_labels").reshape(-1)
                images = _array(archive, f"{split}_images")
                if images.ndim not in (4, 5) or images.dtype.kind not in "ub":
                    raise ValueError(
                        f"{split}_images are {images.dtype} {list(images.shape)}, not uint8 "
                        "[N, depth, height, width]"
                    )
                if len(labels) != len(images):
                    raise ValueError(f"{split} has {len(images)} images, {len(labels)} labels")
                for number, (label, image) in enumerate(zip(labels, images, strict=True)):
                    if label not in range(MOST_CLASSES):
                        raise ValueError(f"label {label} of {split} image {number} is no class")
                    rows.append(_row(path.name, split, number, int(label)))
                    volumes.append(image)
        if not rows:
            raise ValueError("it holds no images")
    except MemoryError:
        raise
    # The parsers raise anything on damaged bytes.
    except Exception as error:
        blame_machine(error, path)
        raise StoreError(
            f"is not a MedMNIST file ({reason_of(error)})",
            where=path,
            fix="It needs {train,val,test}_images and {train,val,test}_labels.",
        ) from None
    return pd.DataFrame(rows), volumes


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array. No more memory is taken than the archive declares.

    Raises:
        ValueError: the array is damaged.
        KeyError: the array is missing.
    """
    member = archive.getinfo(f"{name}.npy")
    try:
        with archive.open(member) as file:
            return read_npy(file, member.file_size)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: {reason_of(error)}") from None


def _row(file: str, split: str, number: int, label: int) -> dict[str, Any]:
    key = f"{split}_{number:05d}"
    return {
        "key": key,
        "filename": f"{file}/{key}",
        "label": label,
        "group": "",
        "weight": 1.0,
        "split": split,
        "crowd_score": float("nan"),
        "tier1": True,
    }
