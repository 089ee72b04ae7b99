"""Advice for operating system errors that are caused by the machine, not by a file's content.

A reader that reports such an error as damage would make the user delete or rebuild a good file.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Container
from contextlib import suppress

from dist_train.errors import MachineError

_PERMISSIONS = "Check who owns it, and the permissions of it and of the folders above it."
_DISK = "The disk or its server fails: look at the system's log (dmesg), and run the command again."
_MEMORY = (
    "Close other programs, use fewer workers or smaller batches, or raise the container's limit."
)
_ROOM = "Make room and run the command again: what is finished is kept."
#: What the user can do, by errno.
ADVICE = {
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or use fewer workers.",
    errno.ENFILE: "All programs of this machine together have too many files open: close some, or "
    "raise fs.file-max.",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "It is on a file system that is mounted read-only: choose another place.",
    errno.EIO: _DISK,
    errno.ESTALE: "Its server has restarted or replaced it: run the command again, and mount the "
    "file system anew if that does not help.",
    errno.ENOTCONN: _DISK,
    errno.ETIMEDOUT: _DISK,
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"Your quota of the disk is used up. {_ROOM}",
    errno.EFBIG: f"{_ROOM} The shell may limit the size of a file (ulimit -f).",
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: "Raise the limit of processes (ulimit -u, or the container's), or use fewer "
    "workers.",
    errno.ENOLCK: "The file system has no locks: choose another one.",
}
#: Parts of library messages about exhausted host memory.
_NO_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc")
#: The most open files to ask for: programs that walk through all descriptors would get slow.
_MANY_FILES = 65536


def advice(error: BaseException) -> str | None:
    """What to do about an error; None if the machine is not its cause."""
    return ADVICE.get(error.errno or 0) if isinstance(error, OSError) else None


def blame_machine(error: BaseException, where: object, *, but: Container[int] = ()) -> None:
    """Raise ``MachineError`` if the machine caused an error; return if the file may be at fault.

    Args:
        where: the file that was read.
        but: errno values for which the file is at fault.

    Raises:
        MachineError: the error's errno is in ``ADVICE``.
    """
    if isinstance(error, OSError) and error.errno in ADVICE and error.errno not in but:
        what, fix = f"cannot be read ({error.strerror})", ADVICE[error.errno]
        raise MachineError(what, where=where, fix=fix) from None


def lack_of_memory(error: BaseException) -> str | None:
    """The message for exhausted host memory; None for any other error."""
    of_torch = isinstance(error, RuntimeError) and any(s in str(error) for s in _NO_HOST_MEMORY)
    if not (of_torch or isinstance(error, MemoryError)):
        return None
    said = first_line(error)
    return f"memory ran out{f' ({said})' if said else ''}. {_MEMORY}"


def first_line(error: BaseException) -> str:
    """The first line of an error, without the code locations that torch adds."""
    said = str(error).partition("\n")[0].rstrip(".")
    return re.sub(r"^\[enforce fail at [^\]]*\] [^.]*\. ", "", said)


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard limit, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A sandbox may forbid it; then the soft limit stays.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_files() -> int:
    """The most files that this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY_FILES if soft == resource.RLIM_INFINITY else soft
