"""Bytes of the shards behind a URL, with a cache on this machine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dist_train.data.store.blocks import Block, BlockLocks, blocks_of, is_filled
from dist_train.data.store.clip_cache import ClipCache
from dist_train.data.store.shard_bytes import LocalShards, Pixels, Span
from dist_train.data.store.shards import shard_name
from dist_train.errors import FileError
from dist_train.files import crc32c
from dist_train.objects import PIECE, Objects

#: Clips that lie nearer to each other are read by one request: its latency costs more.
GAP = 1 << 18
#: Bytes that a process reads ahead at a time: clips, or one if it is longer; and blocks. More of
#: them would come too late from a slow server.
UNDER_WAY, BLOCKS_UNDER_WAY = 128 << 20, 32 << 20
#: Bytes that are kept in memory until they are used; and where the cache has no room.
HELD, HELD_ALONE = 64 << 20, 256 << 20


class RemoteShards:
    """Shards whose URLs are that of ``objects``, ``shards/`` and their names.

    Args:
        cache: writes the clips that were read.
        folder: the cache's folder of these shards.

    Attributes:
        by_blocks: read whole blocks ahead, as most clips are read, and the cache can hold all.
    """

    repair = "Run 'dist-train verify' with the URL; upload its damaged shards again."
    is_remote = True

    def __init__(self, objects: Objects, cache: ClipCache, folder: Path) -> None:
        self._objects, self._cache, self._folder = objects, cache, folder
        self._local, self._locks = LocalShards(folder), BlockLocks(folder.parent / ".blocks")
        self.by_blocks = False
        self._begin()

    def _begin(self) -> None:
        self._coming: dict[Span, list[Future[Any]]] = {}
        self._blocks: dict[Block, Future[Any]] = {}
        self._held: dict[Span, memoryview] = {}
        self._lock = Lock()
        self._budget, self._budget_of_blocks = _Budget(UNDER_WAY), _Budget(BLOCKS_UNDER_WAY)

    def where(self, shard: int) -> str:
        return self._objects.where(_name(shard))

    def prefetch(self, spans: Sequence[Span]) -> None:
        self._coming = {
            span: of_span
            for span, of_span in self._coming.items()
            if not all(each.done() for each in of_span)
        }
        missing = [
            span
            for span in dict.fromkeys(spans)
            if span not in self._coming and span not in self._held and not self._may_have(span)
        ]
        if self.by_blocks and not self._cache.is_full:
            self._start_blocks(missing)
            return
        for group in near(sorted(missing)):
            coming = self._objects.start(self._fetch_ahead(group))
            self._coming |= {span: [coming] for span in group}

    def _start_blocks(self, spans: Sequence[Span]) -> None:
        self._blocks = {block: each for block, each in self._blocks.items() if not each.done()}
        for span in spans:
            blocks = blocks_of(span)
            for block in blocks:
                if block not in self._blocks:
                    self._blocks[block] = self._objects.start(self._fetch_block(block, span))
            self._coming[span] = [self._blocks[block] for block in blocks]

    def read_into(self, out: Pixels, span: Span) -> bool:
        for coming in self._coming.get(span, ()):
            coming.result()
        with self._lock:
            found = self._held.pop(span, None)
        if found is None:
            if self._read_local(out, span):
                return True
            if self.by_blocks:
                # Another process may be fetching it.
                self._locks.wait(blocks_of(span))
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
        return True

    def _may_have(self, span: Span) -> bool:
        with suppress(OSError, FileError):
            return self._local.may_have(span)
        return False

    def _read_local(self, out: Pixels, span: Span) -> bool:
        with suppress(OSError, FileError):
            return self._local.read_into(out, span)
        return False

    async def _fetch_ahead(self, group: Sequence[Span]) -> None:
        async with self._budget.taken(max(span.end for span in group) - group[0].offset):
            right = await self._fetch(group)
        with self._lock:
            self._held |= right
            most = HELD_ALONE if self._cache.is_full else HELD
            while sum(map(len, self._held.values())) > most and len(self._held) > 1:
                del self._held[next(iter(self._held))]

    async def _fetch(self, group: Sequence[Span]) -> dict[Span, memoryview]:
        """Read spans of one shard, in order of their offsets, by one range of bytes.

        Returns:
            Those with the right checksum. They are in the cache, too, if that has room.
        """
        start, end = group[0].offset, max(span.end for span in group)
        content = await self._objects.read(_name(group[0].shard), start, end)
        return await asyncio.to_thread(self._keep, group, start, content)

    async def _fetch_block(self, block: Block, span: Span) -> None:
        """Write the block that a span needs to the cache, unless another process has, or does."""
        async with self._budget_of_blocks.taken(block.end - block.start):
            if not self._locks.take(block):
                return
            try:
                path = self._folder / shard_name(block.shard)
                if not is_filled(path, max(block.start, span.offset), min(block.end, span.end)):
                    content = await self._objects.read(
                        _name(block.shard), block.start, block.end, may_end=True
                    )
                    await asyncio.to_thread(self._cache.write, path, block.start, content)
            finally:
                self._locks.drop(block)

    def _keep(
        self, group: Sequence[Span], start: int, content: memoryview
    ) -> dict[Span, memoryview]:
        parts = {span: content[span.offset - start : span.end - start] for span in group}
        right = {span: part for span, part in parts.items() if _checksum(part) == span.crc32c}
        path = self._folder / shard_name(group[0].shard)
        # What lies between them is right, too.
        whole = len(right) == len(parts)
        written = {start: content} if whole else {s.offset: part for s, part in right.items()}
        for at, part in written.items():
            self._cache.write(path, at, part)
        return right

    def __getstate__(self) -> dict[str, Any]:
        names = "_objects", "_cache", "_folder", "_local", "_locks", "by_blocks"
        return {name: self.__dict__[name] for name in names}

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
    """Bytes that may be under way at once, given in the order in which they are asked for."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        size = min(size, self._size)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._give()
        await turn
        try:
            yield
        finally:
            self._left += size
            self._give()

    def _give(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._left:
            size, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._left -= size
                turn.set_result(None)


def _checksum(content: memoryview) -> int:
    return crc32c(np.frombuffer(content, np.uint8))


def _name(shard: int) -> str:
    return f"shards/{shard_name(shard)}"
