"""Files that cannot grow, as on a full disk, and processes that cannot open more files."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LittleRoom = Callable[[int | None], None]


@contextmanager
def limited() -> Iterator[LittleRoom]:
    """Yield a function that limits the size in bytes of this process's files; None is no limit.

    A write beyond the limit writes a part, and the next one fails, as on a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def set_limit(size: int | None) -> None:
        limit = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        yield set_limit
    finally:
        set_limit(None)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def files_all_open(spare: int = 0) -> Iterator[None]:
    """Context in which this process can open only ``spare`` more files."""
    # Collecting garbage of other tests would release descriptors.
    gc.collect()
    gc.disable()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 9
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, soft), hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(spare):
            os.close(held.pop())
        yield
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
