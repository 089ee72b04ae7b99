"""Types of arrays and records, and names, that all of ``data`` shares."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

Record = dict[str, Any]

#: The most classes of a store.
MOST_CLASSES = 10_000
#: The code of a class as text; -1 stands for none.
CLASS_CODE = r"0|[1-9][0-9]{0,3}"
LABEL = rf"-1|{CLASS_CODE}"
#: Names of the labels, where a store has no other ones.
CLASSES = {0: "negative", 1: "positive", -1: "unlabelled"}
#: Begins the names of columns that are metadata: further columns of the clip table, as text.
METADATA = "meta:"
#: Keys of clips. A tar header (ustar) holds names of at most 100 bytes, and ".json" takes five.
SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")

#: Clips with fewer grey levels, or a larger share of pixels of the largest value, are reported.
FEW_LEVELS, MOST_SATURATED = 16, 0.01
#: Names of the channels of a store that names none.
GREY = ("grey",)
#: The types of stored pixels. All clips of a store have one of them.
DtypeName = Literal["uint8", "uint16", "float16"]
DTYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("|u1"),
    "uint16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}
#: A clip: of one of ``DTYPES``; [D, H, W], or [D, H, W, C] with several channels.
Volume = np.ndarray[tuple[int, ...], np.dtype[Any]]
#: One frame, or one of its planes: uint8 [H, W].
Plane = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


def metadata_columns(columns: Iterable[object]) -> list[str]:
    """Those of a table's columns that are metadata."""
    return [str(name) for name in columns if str(name).startswith(METADATA)]


def class_names(classes: Mapping[str, str] | None) -> dict[int, str]:
    """Names of the labels: 0, 1, then further classes, and -1.

    Args:
        classes: names by "0", "1" and so on, as ``store.json`` has them; None if it has none.
    """
    names = {int(label): name for label, name in (classes or {}).items()}
    known = {0: CLASSES[0], 1: CLASSES[1]} | names
    return {label: known[label] for label in sorted(known)} | {-1: CLASSES[-1]}


def clips_of_class(name: str) -> str:
    """A class in messages: "positives", or "'stalled' clips" if it has a name of its own."""
    return f"{name}s" if name in CLASSES.values() else f"'{name}' clips"
