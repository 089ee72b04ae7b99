"""Types of arrays and records, and names, that all of ``data`` shares."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Record = dict[str, Any]

#: Names of the labels.
CLASSES = {0: "negative", 1: "positive", -1: "unlabelled"}
#: Keys of clips. A tar header (ustar) holds names of at most 100 bytes, and ".json" takes five.
SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")

#: A clip: uint8 [D, H, W].
Volume = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
#: One frame, or one of its planes: uint8 [H, W].
Plane = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
