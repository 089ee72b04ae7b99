"""Frames of a file that stays open until they are read or dropped."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import ExitStack
from typing import IO

import numpy as np

from dist_train.errors import DecodeError

Frames = Generator[np.ndarray, None, None]


def holding(frames: Frames, opened: ExitStack) -> Frames:
    """Return ``frames``; what is open closes after the last one, or when they are dropped."""
    held = opened.pop_all()

    def until_read() -> Frames:
        with held:
            yield from frames

    found = until_read()
    weakref.finalize(found, held.close)
    return found


def check_magic(file: IO[bytes], magic: bytes, kind: str) -> int:
    """Return the size of a file in bytes, and go to its start.

    Raises:
        DecodeError: the file is empty, or does not begin with ``magic``.
    """
    size = file.seek(0, 2)
    file.seek(0)
    begins = file.read(len(magic))
    file.seek(0)
    if begins != magic:
        raise DecodeError(
            f"is no {kind} file" if size else "is empty", fix="Replace the file, or leave it out."
        )
    return size


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
