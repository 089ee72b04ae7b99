"""Types of arrays and records, and names, that all of ``data`` shares."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np

Record = dict[str, Any]

#: Names of the labels.
CLASSES = {0: "negative", 1: "positive", -1: "unlabelled"}
#: Keys of clips. A tar header (ustar) holds names of at most 100 bytes, and ".json" takes five.
SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")

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
