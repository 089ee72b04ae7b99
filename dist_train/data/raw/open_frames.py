"""Frames of a file that stays open until they are read or dropped."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import ExitStack

import numpy as np

Frames = Generator[np.ndarray, None, None]


def holding(frames: Frames, opened: ExitStack) -> Frames:
    """Return ``frames``; what is open closes with them, also if nobody reads them."""
    weakref.finalize(frames, opened.pop_all().close)
    return frames
