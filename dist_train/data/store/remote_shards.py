"""Bytes of the shards behind a URL, with a cache on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dist_train.data.store.clip_cache import ClipCache
from dist_train.data.store.shard_bytes import LocalShards, Pixels, Span
from dist_train.data.store.shards import shard_name
from dist_train.errors import FileError
from dist_train.files import crc32c
from dist_train.objects import PIECE, Objects

#: Clips that lie nearer to each other are read by one request: its latency costs more.
GAP = 1 << 18
#: Bytes under way in a process, or one clip if it is longer.
UNDER_WAY = 128 << 20
#: Bytes that are kept in memory where the cache has no room.
HELD = 256 << 20


class RemoteShards:
    """Shards whose URLs are that of ``objects``, ``shards/`` and their names.

    Args:
        cache: writes the clips that were read.
        folder: the cache's folder of these shards.
    """

    repair = "Run 'dist-train verify' with the URL; upload its damaged shards again."
    is_remote = True

    def __init__(self, objects: Objects, cache: ClipCache, folder: Path) -> None:
        self._objects, self._cache, self._folder = objects, cache, folder
        self._local = LocalShards(folder)
        self._begin()

    def _begin(self) -> None:
        self._coming: dict[Span, Future[Any]] = {}
        self._held: dict[Span, memoryview] = {}
        self._lock = Lock()
        self._budget = _Budget(UNDER_WAY)

    def where(self, shard: int) -> str:
        return self._objects.where(_name(shard))

    def prefetch(self, spans: Sequence[Span]) -> None:
        self._coming = {span: each for span, each in self._coming.items() if not each.done()}
        wanted = {span for span in spans if span not in self._coming and span not in self._held}
        for group in near(sorted(span for span in wanted if not self._may_have(span))):
            coming = self._objects.start(self._fetch(group))
            self._coming |= dict.fromkeys(group, coming)

    def read_into(self, out: Pixels, span: Span) -> bool:
        if (coming := self._coming.get(span)) is not None:
            coming.result()
        with self._lock:
            found = self._held.pop(span, None)
        if found is None:
            if self._read_local(out, span):
                return True
            # Either it was not asked for, or it gave way at once, or wrong bytes came.
            for _ in range(2):
                found = self._objects.start(self._fetch([span])).result().get(span)
                if found is not None:
                    break
        if found is None:
            return False
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(found, np.uint8)
        with self._lock:
            self._held.pop(span, None)
        return True

    def _may_have(self, span: Span) -> bool:
        with suppress(OSError, FileError):
            return self._local.may_have(span)
        return False

    def _read_local(self, out: Pixels, span: Span) -> bool:
        with suppress(OSError, FileError):
            return self._local.read_into(out, span)
        return False

    async def _fetch(self, group: Sequence[Span]) -> dict[Span, memoryview]:
        """Read spans of one shard, in order of their offsets, by one range of bytes.

        Returns:
            Those with the right checksum. They are in the cache then, or held.
        """
        start, end = group[0].offset, max(span.end for span in group)
        async with self._budget.taken(end - start):
            content = await self._objects.read(_name(group[0].shard), start, end)
            return await asyncio.to_thread(self._keep, group, start, content)

    def _keep(
        self, group: Sequence[Span], start: int, content: memoryview
    ) -> dict[Span, memoryview]:
        parts = {span: content[span.offset - start : span.end - start] for span in group}
        right = {span: part for span, part in parts.items() if _checksum(part) == span.crc32c}
        path = self._folder / shard_name(group[0].shard)
        # What lies between them is right, too.
        whole = len(right) == len(parts)
        written = {start: content} if whole else {s.offset: part for s, part in right.items()}
        if not all(self._cache.write(path, at, part) for at, part in written.items()):
            with self._lock:
                self._held |= right
                while sum(map(len, self._held.values())) > HELD and len(self._held) > 1:
                    del self._held[next(iter(self._held))]
        return right

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_objects", "_cache", "_folder", "_local")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def near(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Groups of sorted spans for one request each: less than ``GAP`` apart, ``PIECE`` in all."""
    group: list[Span] = []
    for span in spans:
        if group and (
            span.shard != group[0].shard
            or span.offset - group[-1].end >= GAP
            or span.end - group[0].offset > PIECE
        ):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


class _Budget:
    """Bytes that may be under way at once."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed: asyncio.Condition | None = None

    @asynccontextmanager
    async def taken(self, size: int) -> Any:
        # It belongs to the loop in which it is first used.
        self._changed = changed = self._changed or asyncio.Condition()
        size = min(size, self._size)
        async with changed:
            await changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            async with changed:
                self._left += size
                changed.notify_all()


def _checksum(content: memoryview) -> int:
    return crc32c(np.frombuffer(content, np.uint8))


def _name(shard: int) -> str:
    return f"shards/{shard_name(shard)}"
