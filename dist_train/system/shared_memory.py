"""Limits on worker processes: this process's open files, and /dev/shm for their semaphores."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dist_train.errors import MachineError
from dist_train.system.advice import open_files

FOLDER = "/dev/shm"
#: Files that are open without workers: standard streams, shards, connections to the fork server.
_FILES_OF_ANY = 10
_CANNOT_BE_MADE = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOSYS,
    errno.ENOSPC,
}


def within_open_files(workers: int, files: int) -> int:
    """The number of workers, limited by the open files of this process, at least 1.

    Args:
        files: files that this process has open for each worker.
    """
    return max(1, min(workers, (open_files() - _FILES_OF_ANY) // files))


@contextmanager
def workers_started() -> Iterator[None]:
    """Context for starting the loader's worker processes.

    Raises:
        MachineError: their shared memory cannot be created.
    """
    try:
        yield
    except OSError as error:
        # The error does not name a semaphore.
        of_shared = error.filename is None or str(error.filename).startswith(FOLDER)
        if not of_shared or error.errno not in _CANNOT_BE_MADE:
            raise
        raise MachineError(
            f"worker processes need shared memory ({error.strerror})",
            where=FOLDER,
            fix="Make it writable (Docker: --shm-size=16g), or set loader.workers=0.",
        ) from None
