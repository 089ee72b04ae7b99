"""Clips of the same pixels: which there are, and which of them lie in different splits."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

from dist_train.data.store.reader import Store
from dist_train.errors import PlanError, StoreError

CLASSES = {0: "negative", 1: "positive", -1: "unlabelled"}

# Pixels that are read to compare clips of one checksum and shape. Beyond it these two are trusted:
# few clips that differ agree in both by chance, and reading all copies of a large set takes hours.
MOST_PIXELS = 1 << 28


def find_duplicates(store: Store) -> pd.Series:
    """For each clip the key of the first clip that has the same pixels, which may be its own.

    Clips of one CRC-32C and shape are compared by SHA-256 of their pixels, as long as those are
    at most ``MOST_PIXELS`` in all, or cannot be read.
    """
    table = store.table
    columns = [table[name] for name in ("crc32c", "frames", "height", "width")]
    alike = pd.Series(table.groupby(columns, sort=False).ngroup(), index=table.index)
    copies = alike.index[alike.duplicated(keep=False)]
    # Nearly all clips have no copy: strings are made of those alone that may have one.
    identity = alike[copies].map(str)
    shape = table.loc[copies, ["frames", "height", "width"]].to_numpy(np.int64)
    if shape.prod(axis=1).sum() <= MOST_PIXELS:
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
    """How many clips have the pixels of another one, in a sentence; None if none has."""
    table = store.table.assign(same=find_duplicates(store))
    copies = table[table["same"].duplicated(keep=False)]
    if copies.empty:
        return None
    return (
        f"{len(copies)} clips have the same pixels as another clip"
        f"{_opposite(copies)}, such as {_pair(copies, 'label')}"
    )


def duplicates_across(clips: pd.DataFrame, same: pd.Series) -> str | None:
    """How many clips have the pixels of one in another split, in a sentence; None if none has.

    Args:
        clips: columns ``filename``, ``label``, ``split``; one row a clip.
        same: of ``find_duplicates``, for these rows.
    """
    clips = clips.assign(same=same)
    copies = clips[clips.groupby("same")["split"].transform("nunique") > 1]
    if copies.empty:
        return None
    return (
        f"{len(copies)} clips have the same pixels as a clip in another split"
        f"{_opposite(copies)}, such as {_pair(copies, 'split')}"
    )


def refuse_duplicates(told: str, *, given: bool) -> PlanError:
    """The error for ``duplicates_across``; ``given``: the splits are the manifest's own."""
    together = "" if given else "split.duplicates=together to have copies in one split, or "
    return PlanError(
        told,
        fix=f"Take the copies out of the manifest, or set {together}split.duplicates=keep.",
    )


def _opposite(copies: pd.DataFrame) -> str:
    number = int(_contradict(copies).sum())
    return f" ({number} of them with opposite labels)" if number else ""


def _contradict(copies: pd.DataFrame) -> pd.Series:
    """Whether a clip's copies have both labels: bool, one a row."""
    known = copies["label"].where(copies["label"] >= 0)
    return known.groupby(copies["same"]).transform("nunique") > 1


def _pair(copies: pd.DataFrame, differ: str) -> str:
    """Two copies of each other, which differ in the column ``differ`` if any do; with opposite
    labels among their set, if there is such a set."""
    contradict = copies[_contradict(copies)]
    same = (copies if contradict.empty else contradict)["same"].iloc[0]
    of_set = copies[copies["same"] == same]
    first = of_set.iloc[0]
    unlike = of_set[of_set[differ] != first[differ]]
    return f"{_named(first)} and {_named((of_set.iloc[1:] if unlike.empty else unlike).iloc[0])}"


def _named(clip: pd.Series) -> str:
    split = f"{clip['split']}, " if clip["split"] else ""
    return f"'{clip['filename']}' ({split}{CLASSES[int(clip['label'])]})"
