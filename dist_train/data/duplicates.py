"""Find clips with the same pixels, and those of them that lie in different splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from dist_train.data.store.reader import Store
from dist_train.data.types import CLASSES
from dist_train.errors import PlanError, StoreError

# The most pixels that are read for the comparison. Beyond it checksum and shape are trusted: they
# agree by chance for few clips, and reading all copies in a large store takes hours.
MOST_PIXELS = 1 << 28


def find_duplicates(store: Store) -> pd.Series:
    """For each clip, the key of the first clip with the same pixels, which may be its own.

    Clips with the same CRC-32C and shape are compared by the SHA-256 of their pixels, if there are
    at most ``MOST_PIXELS`` of them. Clips that cannot be read are not compared further.
    """
    table = store.table
    columns = [table[name] for name in ("crc32c", "frames", "height", "width")]
    alike = pd.Series(table.groupby(columns, sort=False).ngroup(), index=table.index)
    copies = alike.index[alike.duplicated(keep=False)]
    # Few clips have copies: strings are made for these alone.
    identity = alike[copies].map(str)
    shape = table.loc[copies, ["frames", "height", "width"]].to_numpy(np.int64)
    if shape.prod(axis=1).sum() <= MOST_PIXELS:
        store.prefetch(map(int, copies))
        for clip in copies:
            try:
                digest = hashlib.sha256(store.read(int(clip)).data).hexdigest()
            except StoreError:
                continue
            identity[clip] += digest
    same = table["key"].copy()
    same[copies] = table.loc[copies].groupby(identity)["key"].transform("min")
    return same


def describe_duplicates(store: Store) -> str | None:
    """A sentence that counts the clips with copies; None if there are none."""
    clips = store.table.assign(same=find_duplicates(store))
    copies = clips[clips["same"].duplicated(keep=False)]
    return _sentence(copies, "another clip", "label", store.classes)


def duplicates_across(
    clips: pd.DataFrame, same: pd.Series, classes: Mapping[int, str] = CLASSES
) -> str | None:
    """A sentence that counts the clips with copies in another split; None if there are none.

    Args:
        clips: columns ``filename``, ``label``, ``split``; one row a clip.
        same: the result of ``find_duplicates`` for these rows.
        classes: names of the labels.
    """
    clips = clips.assign(same=same)
    copies = clips[clips.groupby("same")["split"].transform("nunique") > 1]
    return _sentence(copies, "a clip in another split", "split", classes)


def duplicates_error(description: str, *, given: bool) -> PlanError:
    """The error for ``duplicates_across``; ``given``: the manifest gives the splits."""
    together = "" if given else "split.duplicates=together to have copies in one split, or "
    return PlanError(
        description,
        fix=f"Remove the copies from the manifest, or set {together}split.duplicates=keep.",
    )


def _sentence(
    copies: pd.DataFrame, other: str, differ: str, classes: Mapping[int, str]
) -> str | None:
    """The number of copies, and a pair of them as an example.

    The pair has opposite labels if any copies have; its clips differ in the column ``differ`` if
    any of their set do.
    """
    if copies.empty:
        return None
    known = copies["label"].where(copies["label"] >= 0)
    opposite = known.groupby(copies["same"]).transform("nunique") > 1
    share = f" ({opposite.sum()} of them with opposite labels)" if opposite.any() else ""
    sets = copies[opposite] if opposite.any() else copies
    first, *others = sets[sets["same"] == sets["same"].iloc[0]].to_dict("records")
    second = next((clip for clip in others if clip[differ] != first[differ]), others[0])
    names = []
    for clip in (first, second):
        split = f"{clip['split']}, " if clip["split"] else ""
        names.append(f"'{clip['filename']}' ({split}{classes[clip['label']]})")
    return (
        f"{len(copies)} clips have the same pixels as {other}{share}, such as {' and '.join(names)}"
    )
