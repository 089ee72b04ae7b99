"""Advice for operating system errors that are caused by the machine, not by a file's content.

A reader that reports such an error as damage would make the user delete or rebuild a good file.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Container

from dist_train.errors import MachineError

_PERMISSIONS = "Check who owns it, and the permissions of it and of the folders above it."
_DISK = "The disk or its server fails: look at the system's log (dmesg), and run the command again."
_MEMORY = (
    "Close other programs, use fewer workers or smaller batches, or raise the container's limit."
)
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
    errno.ENOSPC: "Make room and run the command again: what is finished is kept.",
    errno.EDQUOT: "Your quota of the disk is used up. Make room and run the command again: what is "
    "finished is kept.",
    errno.EFBIG: "Make room and run the command again: what is finished is kept. The limit may be "
    "the shell's, of a file's size (ulimit -f).",
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
        but: errno values for which the file counts as the cause all the same.

    Raises:
        MachineError: the error's errno is in ``ADVICE``.
    """
    if not isinstance(error, OSError) or error.errno not in ADVICE or error.errno in but:
        return
    raise MachineError(
        f"cannot be read ({error.strerror})", where=where, fix=ADVICE[error.errno]
    ) from None


def lack_of_memory(error: BaseException) -> str | None:
    """The message for exhausted host memory; None for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and any(sign in text for sign in _NO_HOST_MEMORY)
    ):
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
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            # A sandbox may forbid it; then the soft limit stays.
            return


def open_files() -> int:
    """The most files that this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY_FILES if soft == resource.RLIM_INFINITY else soft
