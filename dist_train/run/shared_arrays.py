"""Arrays that are costly to make, and that all processes of a node map: one makes them, and keeps
them in the user's cache folder for the next launch."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_train.array_file import Array, ArrayFile, write_arrays
from dist_train.errors import DistTrainError, FileError
from dist_train.files import aside_for, open_lock, written_whole
from dist_train.places import user_cache

#: Files that are kept: those used last.
KEPT = 12
SUFFIX = ".safetensors"

log = logging.getLogger(__name__)


def shared_arrays(
    name: str,
    key: object,
    make: Callable[[], Mapping[str, Array]],
    is_kept: Callable[[Mapping[str, Array]], bool] = lambda _: True,
) -> Mapping[str, Array]:
    """The arrays of ``make``, mapped from a file if there is a place for it.

    Args:
        key: everything that the arrays depend on; its ``repr`` counts.
        is_kept: whether others, and later launches, may use the arrays that were made.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = user_cache() / f"{name}-{digest}{SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(path.parent / ".lock")
    except (OSError, DistTrainError) as error:
        log.warning("large arrays are not shared by processes or launches: %s", error)
        return make()
    with lock, _locked(lock.fileno()):
        if (found := _read(path)) is not None:
            return found
        made = make()
        if not is_kept(made):
            return made
        try:
            with written_whole(path) as file:
                write_arrays(file, made)
            _remove_old(path.parent)
            return _read(path) or made
        except (OSError, DistTrainError) as error:
            log.warning("large arrays are not shared by processes or launches: %s", error)
            return made


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    # Without locks two processes make the same file, each whole.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield


def _read(path: Path) -> dict[str, Array] | None:
    """The arrays of a file, checked to the last byte; None if it is not there, or is damaged."""
    try:
        arrays = ArrayFile(path)
        arrays.check()
        # The files used last are kept.
        os.utime(path)
    except (OSError, FileError):
        return None
    return {name: arrays[name] for name in arrays}


def _remove_old(folder: Path) -> None:
    """Remove what killed processes left, and all files but those used last."""
    files = []
    for path in folder.iterdir():
        with suppress(OSError):
            if (aside_for(path) or "").endswith(SUFFIX):
                path.unlink()
            elif path.suffix == SUFFIX and not path.is_symlink():
                files.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(files)[:-KEPT]:
        path.unlink(missing_ok=True)
