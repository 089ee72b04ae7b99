"""What parsers raise on damaged bytes -> DecodeError; values that a file declares but lacks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dist_train.errors import DecodeError, DistTrainError
from dist_train.files import reason_of
from dist_train.system.advice import blame_machine

# Errors of the machine that a single file may cause.
OF_A_FILE = {errno.EACCES, errno.EPERM, errno.ENOMEM}
# DEFLATE packs at most 1032 bytes into one (zlib's technical details).
MOST_PACKED = 1032


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Raise DecodeError for what a parser raises on damaged bytes: struct, zlib, type errors, ...

    The machine's errors are not the file's: MachineError and MemoryError.
    """
    try:
        yield
    except (DistTrainError, MemoryError):
        raise
    except Exception as error:
        blame_machine(error, where, but=OF_A_FILE)
        raise DecodeError(f"cannot be read ({reason_of(error)})", where=where) from None


def too_large(where: object) -> DecodeError:
    """The error for a file whose decoding ran out of memory."""
    return DecodeError(
        "takes more memory to decode than it may",
        where=where,
        fix="Cut it into shorter clips, or prepare anew with a larger --clip-memory.",
    )


def check_held(declared: int, held: int) -> None:
    """Raise DecodeError if a file holds fewer bytes of values than it declares."""
    if declared > held:
        raise DecodeError(
            f"is cut short: declares {declared} bytes of values, holds {held}",
            fix="Replace the file.",
        )


def check_packed(declared: int, packed: int) -> None:
    """Raise DecodeError if zlib cannot have packed so many bytes into ``packed`` ones."""
    if declared > MOST_PACKED * packed:
        raise DecodeError(
            f"declares {declared} bytes of values, and {packed} packed ones cannot hold them",
            fix="Replace the file.",
        )
