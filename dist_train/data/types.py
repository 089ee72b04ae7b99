"""Types of arrays and records that all of ``data`` shares."""

from __future__ import annotations

from typing import Any

import numpy as np

Record = dict[str, Any]

#: A clip: uint8 [D, H, W].
Volume = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
#: One frame, or one of its planes: uint8 [H, W].
Plane = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
