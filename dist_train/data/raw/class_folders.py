"""A clip table from a folder with one folder for each class."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dist_train.data.raw.clip import CONVERT, suffix_of
from dist_train.data.raw.formats import suffixes as format_suffixes
from dist_train.data.raw.video import VIDEO_SUFFIXES
from dist_train.data.table.manifest import Manifest, check_text, make_manifest
from dist_train.errors import ManifestError

log = logging.getLogger(__name__)


def manifest_from_folders(
    folder: Path, positive: Sequence[str], suffixes: Sequence[str] = ()
) -> Manifest:
    """Return the clips in ``folder/CLASS/**``, ordered by name, and log which class is which.

    Args:
        positive: the folders of positive clips. All other clips are negative.
        suffixes: further suffixes of files that are read, in lower case.

    Raises:
        ManifestError: a folder does not exist, or a class has no clips.
        OSError: a folder cannot be listed.
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
    read = (*VIDEO_SUFFIXES, *format_suffixes(), *suffixes)
    clips: dict[str, list[str]] = {name: [] for name in classes}
    left = [path.name for path in folder.iterdir() if _seen(path.name) and not path.is_dir()]
    for name in classes:
        for inner, folders, files in os.walk(folder / name, onerror=_raise):
            folders[:] = filter(_seen, folders)
            here = Path(inner).relative_to(folder)
            # Links to folders may form circles, and are not followed.
            left += [str(here / link) for link in folders if (folder / here / link).is_symlink()]
            for file in filter(_seen, files):
                is_clip = file.lower().endswith(read)
                (clips[name] if is_clip else left).append(str(here / file))
    if left:
        first = min(left)
        log.warning(
            "%s: %d files and links are left out: they are of no kind that is read, or in no class "
            "folder. The first is %s. %s",
            folder, len(left), first, CONVERT.get(suffix_of(first), ""),
        )  # fmt: skip
    rows: list[tuple[str, str]] = []
    for label, title in (("1", "positive"), ("0", "negative")):
        of_class = {name: clips[name] for name in classes if (name in positive) == (label == "1")}
        counts = ", ".join(f"{name} ({len(names)})" for name, names in of_class.items())
        if not any(of_class.values()):
            raise ManifestError(
                f"there are no {title} clips ({counts or 'no such folder'})",
                where=folder,
                fix="It needs one folder for each class, which --positive names or does not name.",
            )
        log.warning("%s: %s clips are those of %s", folder, title, counts)
        rows += [(name, label) for names in of_class.values() for name in names]
    for name, _ in rows:
        check_text(name, folder)
    table = pd.DataFrame(sorted(rows), columns=["filename", "label"], dtype=str)
    return make_manifest(table.set_axis(range(1, len(table) + 1)), folder)


def _raise(error: OSError) -> None:
    """Raise: a folder that cannot be listed may have clips."""
    raise error


def _seen(name: str) -> bool:
    return not name.startswith(".")
