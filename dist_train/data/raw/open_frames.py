"""Frames of a file that stays open until they are read or dropped."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import ExitStack
from typing import IO

import numpy as np

Frames = Generator[np.ndarray, None, None]


def holding(frames: Frames, opened: ExitStack) -> Frames:
    """Return ``frames``; what is open closes with them, also if nobody reads them."""
    weakref.finalize(frames, opened.pop_all().close)
    return frames


class OnlyFile:
    """A file without name and descriptor, so that a library looks for no other files of a set."""

    def __init__(self, file: IO[bytes]) -> None:
        self.name = ""
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close
        self.closed = False

    def readinto(self, buffer: bytearray | memoryview) -> int:
        data = self.read(len(memoryview(buffer).cast("B")))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)
