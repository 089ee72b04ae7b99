"""A clip table from a folder that has one folder for each class."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dist_train.data.decode import VIDEO_SUFFIXES
from dist_train.data.manifest import Manifest, make_manifest
from dist_train.data.volume_file import VOLUME_SUFFIXES
from dist_train.errors import ManifestError

log = logging.getLogger(__name__)


def manifest_from_folders(folder: Path, positive: Sequence[str]) -> Manifest:
    """The clips in ``folder/CLASS/**``, ordered by name.

    Args:
        positive: the folders of the positive class. The clips of all others are negatives, which is
            told.

    Raises:
        ManifestError: it is no such folder, or a class has no clips.
    """
    if not folder.is_dir():
        raise ManifestError("is not a folder", where=folder)
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and _seen(path.name))
    for name in positive:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            raise ManifestError(
                f"there is no folder '{name}'",
                where=folder,
                fix=f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(classes)}.",
            )
    rows, left = [], 0
    counts = dict.fromkeys(classes, 0)
    for name in classes:
        for inner, folders, files in os.walk(folder / name):
            folders[:] = filter(_seen, folders)
            for file in filter(_seen, files):
                if Path(file).suffix.lower() not in VIDEO_SUFFIXES | VOLUME_SUFFIXES:
                    left += 1
                    continue
                path = (Path(inner) / file).relative_to(folder)
                rows.append((str(path), str(int(name in positive))))
                counts[name] += 1
    for title, names in (
        ("positive", [name for name in classes if name in positive]),
        ("negative", [name for name in classes if name not in positive]),
    ):
        told = ", ".join(f"{name} ({counts[name]})" for name in names)
        if not sum(counts[name] for name in names):
            raise ManifestError(
                f"there are no {title} clips ({told or 'no such folder'})",
                where=folder,
                fix="It needs one folder for each class, which --positive names or does not name.",
            )
        log.warning("%s: %s clips are those of %s", folder, title, told)
    if left:
        log.warning("%s: %d files are of no kind that is read, and are left out", folder, left)
    for name, _ in rows:
        if not name.isprintable():
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ManifestError(
                    f"the name of a file is no UTF-8: {name}",
                    where=folder,
                    fix="Give the file another name.",
                ) from None
    table = pd.DataFrame(sorted(rows), columns=["filename", "label"], dtype=str)
    return make_manifest(table.set_axis(range(1, len(table) + 1)), folder)


def _seen(name: str) -> bool:
    return not name.startswith(".")
