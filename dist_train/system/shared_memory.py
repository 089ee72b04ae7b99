"""What worker processes need of the machine: files that this process has open, and /dev/shm, where
their semaphores are."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dist_train.errors import MachineError
from dist_train.system.advice import open_files

FOLDER = "/dev/shm"
#: At the least: input and outputs, shards, and connections to the fork server.
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
    """As many workers as this process may open files for, and 1 at the least.

    Args:
        files: that it has open for each worker.
    """
    return max(1, min(workers, (open_files() - _FILES_OF_ANY) // files))


@contextmanager
def workers_started(without: str) -> Iterator[None]:
    """Around what starts worker processes.

    Args:
        without: how the user does without them.

    Raises:
        MachineError: what they share cannot be made.
    """
    try:
        yield
    except OSError as error:
        # A semaphore's name is not in the error.
        of_shared = error.filename is None or str(error.filename).startswith(FOLDER)
        if not of_shared or error.errno not in _CANNOT_BE_MADE:
            raise
        raise MachineError(
            f"worker processes need shared memory ({error.strerror})",
            where=FOLDER,
            fix=f"Make it writable (Docker: --shm-size=16g), or {without}.",
        ) from None
