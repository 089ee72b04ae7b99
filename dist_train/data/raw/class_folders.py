"""A clip table from a folder that has one folder for each class."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dist_train.data.raw.clip import CONVERT, suffix_of
from dist_train.data.raw.video import VIDEO_SUFFIXES
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES
from dist_train.data.table.manifest import Manifest, check_text, make_manifest
from dist_train.errors import ManifestError

log = logging.getLogger(__name__)


def manifest_from_folders(
    folder: Path, positive: Sequence[str], suffixes: Sequence[str] = ()
) -> Manifest:
    """The clips in ``folder/CLASS/**``, ordered by name.

    Args:
        positive: the folders of the positive class. The clips of all others are negatives, which is
            told.
        suffixes: further endings of files that are read, in lower case.

    Raises:
        ManifestError: it is no such folder, or a class has no clips.
        OSError: a folder cannot be looked into.
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
    rows: list[tuple[str, str]] = []
    left = [path.name for path in folder.iterdir() if _seen(path.name) and not path.is_dir()]
    counts = dict.fromkeys(classes, 0)
    for name in classes:
        for inner, folders, files in os.walk(folder / name, onerror=_raise):
            folders[:] = filter(_seen, folders)
            here = Path(inner).relative_to(folder)
            # Links to folders may lead in circles, and are not followed.
            left += [str(here / link) for link in folders if (folder / here / link).is_symlink()]
            for file in filter(_seen, files):
                if file.lower().endswith((*VIDEO_SUFFIXES, *VOLUME_SUFFIXES, *suffixes)):
                    rows.append((str(here / file), str(int(name in positive))))
                    counts[name] += 1
                else:
                    left.append(str(here / file))
    if left:
        first = min(left)
        log.warning(
            "%s: %d files and links are left out: they are of no kind that is read, or in no class "
            "folder. The first is %s. %s",
            folder, len(left), first, CONVERT.get(suffix_of(first), ""),
        )  # fmt: skip
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
    for name, _ in rows:
        check_text(name, folder)
    table = pd.DataFrame(sorted(rows), columns=["filename", "label"], dtype=str)
    return make_manifest(table.set_axis(range(1, len(table) + 1)), folder)


def _raise(error: OSError) -> None:
    """A folder that cannot be looked into is not one without clips."""
    raise error


def _seen(name: str) -> bool:
    return not name.startswith(".")
