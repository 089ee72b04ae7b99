"""A file that grows by whole records, and outlasts a full disk."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.files import plain_descriptor


class GrowingFile:
    """Appends to a file whole records or nothing of them.

    A record that the disk has no room for waits in memory, and so do those after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = plain_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._size = os.fstat(self._descriptor).st_size
        self._waiting: list[bytes] = []

    def append(self, record: bytes) -> None:
        """Hand the record, and all that wait, to the system.

        Raises:
            OSError: it cannot be written now. It waits for the next call, of ``flush`` also.
        """
        self._waiting.append(record)
        self._write()

    def flush(self) -> None:
        """Put all on the disk.

        Raises:
            OSError: there is no room, or the disk fails.
        """
        self._write()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """What waits by now is lost."""
        os.close(self._descriptor)

    def _write(self) -> None:
        while self._waiting:
            record = memoryview(self._waiting[0])
            try:
                while record:
                    record = record[os.write(self._descriptor, record) :]
            except OSError as error:
                error.filename = str(self.path)
                os.ftruncate(self._descriptor, self._size)
                raise
            self._size += len(self._waiting.pop(0))
