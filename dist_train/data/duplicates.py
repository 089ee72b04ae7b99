"""Find clips with the same pixels, and those of them that lie in different splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from dist_train.data.plan.shuffle import Ints
from dist_train.data.store.clip_table import ClipTable
from dist_train.data.store.reader import Store
from dist_train.data.types import CLASSES
from dist_train.errors import PlanError, StoreError

#: Of what ``find_duplicates`` gives: another number for other copies of the same store.
VERSION = 1
# The most pixels that are read for the comparison. Beyond it checksum and shape are trusted: they
# agree by chance for few clips, and reading all copies in a large store takes hours.
MOST_PIXELS = 1 << 28
# Clips that are looked up at a time.
PIECE = 1 << 20


class Copies(NamedTuple):
    """Clips with copies: their numbers, ascending, and the first clip with the same pixels, which
    may be the clip itself. int64 [n] each. ``unread``: some clips could not be read, so a later
    look may find others."""

    clips: Ints
    first: Ints
    unread: bool = False

    def among(self, chosen: np.ndarray) -> Copies:
        """The copies for which ``chosen``, bool [clips of the store], holds."""
        kept = chosen[self.clips]
        return Copies(self.clips[kept], self.first[kept], self.unread)


def find_duplicates(store: Store) -> Copies:
    """The clips that have copies in the store.

    Clips with the same CRC-32C and shape are compared by the SHA-256 of their pixels, if there are
    at most ``MOST_PIXELS`` of them. Clips that cannot be read are not compared further.
    """
    shape = ["frames", "height", "width"]
    alike = store.table.frame(_of_equal_checksums(store.table["crc32c"]), ["crc32c", *shape])
    alike = alike[alike.duplicated(keep=False)]
    # Few clips have copies: strings are made for these alone.
    identity = alike.groupby(["crc32c", *shape], sort=False).ngroup().map(str)
    unread = False
    if alike[shape].prod(axis=1).sum() <= MOST_PIXELS:
        store.prefetch(map(int, alike.index))
        for clip in alike.index:
            try:
                digest = hashlib.sha256(store.read(int(clip)).data).hexdigest()
            except StoreError:
                unread = True
                continue
            identity[clip] += digest
    identity = identity[identity.duplicated(keep=False)]
    clips = identity.index.to_numpy(np.int64)
    first = pd.Series(clips, index=identity.index).groupby(identity).transform("min")
    return Copies(clips, first.to_numpy(np.int64), unread)


def _of_equal_checksums(crc32c: np.ndarray) -> Ints:
    """Numbers of the clips whose checksum another clip has, ascending: int64 [n]."""
    ordered = np.sort(crc32c)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    found = [np.empty(0, np.int64)]
    for first in range(0, len(crc32c) if len(repeated) else 0, PIECE):
        piece = crc32c[first : first + PIECE]
        places = np.minimum(np.searchsorted(repeated, piece), len(repeated) - 1)
        found.append(first + np.flatnonzero(repeated[places] == piece))
    return np.concatenate(found)


def describe_duplicates(store: Store) -> str | None:
    """A sentence that counts the clips with copies; None if there are none."""
    copies = find_duplicates(store)
    return _sentence(_frame(store.table, copies), "another clip", "label", store.classes)


def duplicates_across(
    table: ClipTable,
    splits: pd.Series,
    copies: Copies,
    classes: Mapping[int, str] = CLASSES,
) -> str | None:
    """A sentence that counts the clips with copies in another split; None if there are none.

    Args:
        splits: the split of each of the ``copies``.
        classes: names of the labels.
    """
    clips = _frame(table, copies).assign(split=splits.to_numpy())
    across = clips[clips.groupby("same")["split"].transform("nunique") > 1]
    return _sentence(across, "a clip in another split", "split", classes)


def _frame(table: ClipTable, copies: Copies) -> pd.DataFrame:
    frame = table.frame(copies.clips, ["filename", "label", "split"])
    return frame.assign(same=copies.first)


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
