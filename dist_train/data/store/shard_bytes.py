"""Bytes of the shards in a local folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dist_train.data.store.shards import REPAIR, shard_name
from dist_train.files import crc32c, plain_descriptor
from dist_train.places import Location
from dist_train.system.advice import open_files

# Most shards that are kept open: a large store has more of them than a process may open files.
# Three quarters of the files that it may open are left to workers, connections, checkpoints.
OPEN_SHARDS = 256
SHARE_OF_OPEN_FILES = 4

Pixels = np.ndarray[Any, Any]


class Span(NamedTuple):
    """The pixels of a clip: ``length`` bytes of a shard, and their CRC-32C."""

    shard: int
    offset: int
    length: int
    crc32c: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class ShardBytes(Protocol):
    """Where the bytes of shards come from.

    Processes get copies by pickling, which open their own files. Threads must not share one.

    Attributes:
        repair: what the user can do about wrong bytes.
        is_remote: reading takes long, so ``prefetch`` pays.
    """

    repair: str
    is_remote: bool

    def read_into(self, out: Pixels, span: Span) -> bool:
        """Read a span into ``out``, C-contiguous, and return whether it has its checksum.

        Raises:
            OSError, FileError: the shard cannot be read.
            RemoteError: the server does not give it.
        """

    def prefetch(self, spans: Sequence[Span]) -> None:
        """Start reading spans that are soon asked for."""

    def where(self, shard: int) -> Location:
        """The place of a shard, for messages."""


class LocalShards:
    """Shards of a local folder, one ``pread`` a span."""

    repair, is_remote = REPAIR, False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Shard number to file descriptor, least recently used first.
        self._descriptors: dict[int, int] = {}

    def read_into(self, out: Pixels, span: Span) -> bool:
        read = os.preadv(self._descriptor(span.shard), [out.data], span.offset)
        return read == span.length and crc32c(out) == span.crc32c

    def prefetch(self, spans: Sequence[Span]) -> None:
        pass

    def where(self, shard: int) -> Path:
        return self.folder / shard_name(shard)

    def may_have(self, span: Span) -> bool:
        """Whether the file is there and has no hole in the span; the bytes may still be wrong.

        Raises:
            OSError, FileError: there is no such file, or it ends before the span.
        """
        return os.lseek(self._descriptor(span.shard), span.offset, os.SEEK_HOLE) >= span.end

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            path = self.folder / shard_name(shard)
            if len(self._descriptors) >= min(OPEN_SHARDS, open_files() // SHARE_OF_OPEN_FILES):
                self._close_one()
            try:
                descriptor = plain_descriptor(path, os.O_RDONLY)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._descriptors:
                    raise
                # This process has opened too many other files.
                self._close_one()
                descriptor = plain_descriptor(path, os.O_RDONLY)
        self._descriptors[shard] = descriptor
        return descriptor

    def _close_one(self) -> None:
        if self._descriptors:
            os.close(self._descriptors.pop(next(iter(self._descriptors))))

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}
