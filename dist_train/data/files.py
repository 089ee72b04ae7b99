"""Files that are whole or not there: written aside, synced, then renamed; and their checksum."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import google_crc32c
import numpy as np

PARTIAL = ".partial"


@contextmanager
def written_whole(path: Path, *, contested: bool = False) -> Iterator[IO[bytes]]:
    """Open ``path`` for binary writing so that it appears complete, durable, or not at all.

    The bytes go to a file beside it, which is fsynced and renamed when the block ends well and
    removed when it does not; a killed process leaves at most the ``.partial`` file.

    Args:
        contested: another process may write the same at this time, as when a node that seemed lost
            is not; each then has a file of its own, and the last to end well counts.
    """
    own = f".{secrets.token_hex(4)}" if contested else ""
    aside = path.with_name(path.name + own + PARTIAL)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # As of a full disk: writing, other than opening, names no file.
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes | str, *, contested: bool = False) -> None:
    """``written_whole`` for content that is at hand; text is written as UTF-8."""
    with written_whole(path, contested=contested) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_writable(folder: Path) -> None:
    """Make the folder, and a nameless file in it that is gone at once: for work that takes long and
    is written at its end.

    Raises:
        OSError: naming the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (POSIX: the directory itself must be fsynced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32c(data: bytes | np.ndarray[Any, Any]) -> int:
    """Checksum of bytes, or of a C-contiguous array's bytes: CRC-32C (Castagnoli), unsigned."""
    return int(google_crc32c.value(data))
