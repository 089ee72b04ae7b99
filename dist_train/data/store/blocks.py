"""Blocks of shards: who reads most clips of a remote store reads them by fewer, larger requests.

The processes of a machine share a cache, and each block is fetched by one of them: a byte of a file
is locked meanwhile. The kernel drops the lock with its owner. Where there are no locks, each
process fetches for itself.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.data.store.shard_bytes import Span
from dist_train.errors import FileError
from dist_train.files import plain_descriptor

BLOCK = 2 << 20
#: Seconds between two looks at another process's lock, and after which its block is not waited for.
LOOK, PATIENCE = 0.005, 20.0
# No shard has more blocks.
_PER_SHARD = 1 << 32


class Block(NamedTuple):
    """Part ``number`` of a shard. The last one of a shard may be shorter."""

    shard: int
    number: int

    @property
    def start(self) -> int:
        return self.number * BLOCK

    @property
    def end(self) -> int:
        return self.start + BLOCK


def blocks_of(span: Span) -> list[Block]:
    """The blocks in which a span lies."""
    numbers = range(span.offset // BLOCK, -(-span.end // BLOCK))
    return [Block(span.shard, number) for number in numbers]


def is_filled(path: Path, start: int, end: int) -> bool:
    """Whether a file has bytes from ``start`` to ``end``, and no hole there."""
    with suppress(OSError, FileError):
        descriptor = plain_descriptor(path, os.O_RDONLY)
        try:
            return os.lseek(descriptor, start, os.SEEK_HOLE) >= end
        finally:
            os.close(descriptor)
    return False


class BlockLocks:
    """Locks of this process on blocks. Its threads do not exclude each other.

    Args:
        path: the file of the locks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, block: Block) -> bool:
        """Lock a block, and return False if another process has it."""
        try:
            self._lock(block, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except (OSError, FileError):
            # There are no locks here.
            pass
        return True

    def drop(self, block: Block) -> None:
        with suppress(OSError, FileError):
            self._lock(block, fcntl.LOCK_UN)

    def wait(self, blocks: Iterable[Block]) -> None:
        """Wait until no other process has any of them, or it takes too long."""
        last = time.monotonic() + PATIENCE
        for block in blocks:
            while not self.take(block):
                if time.monotonic() > last:
                    return
                time.sleep(LOOK)
            self.drop(block)

    def _lock(self, block: Block, how: int) -> None:
        if self._descriptor is None:
            self._descriptor = plain_descriptor(self._path, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(self._descriptor, how, 1, block.shard * _PER_SHARD + block.number)

    def __del__(self) -> None:
        if (descriptor := self.__dict__.get("_descriptor")) is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}
