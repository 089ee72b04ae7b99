"""Files that cannot grow, as on a full disk."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LittleRoom = Callable[[int | None], None]


@contextmanager
def limited() -> Iterator[LittleRoom]:
    """Within it, the size in bytes that no file of this process may pass can be set; None is any.

    A write that would pass it writes a part, and the next one fails, as on a full disk.
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
