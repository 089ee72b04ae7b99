"""One shared memory for all batches of a loader: regions are lent, given back, and lent again.

A fresh shared file for each batch, PyTorch's way, costs more in page faults than filling it with
clips. Here the pages stay, so what a batch costs is its pixels.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import multiprocessing
import os
import weakref
from collections import deque
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.data.types import Volume

PAGE = mmap.PAGESIZE
# The part of it that was written to may be so many times what the regions in use reach to.
SLACK = 2
# What one fault maps, where the pages are there (Linux's fault_around_bytes), by reading.
FAULT_AROUND = 16 * PAGE
PIECE = 256 * PAGE
_ZEROS = bytes(PIECE)
MOST_AT_ONCE = os.sysconf("SC_IOV_MAX")

_numbers = itertools.count()
# Of this process, for the batches that come from workers.
_arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()


class _RegionReference(weakref.ref[Volume]):
    """To the array of the region at ``offset``."""

    __slots__ = ("offset",)
    offset: int


class Arena:
    """Shared memory of ``size`` bytes, of which only what is written to takes memory.

    It is nameless (``memfd_create``): nothing is left of it, however its processes end, and the
    size of /dev/shm, 64 MB in many containers, is no limit. The process that makes it lends and
    takes back; a worker that it is passed to, while that starts, sees the same bytes.

    Raises:
        OSError: the system does not give so much address space, or no file descriptor.
    """

    def __init__(self, size: int) -> None:
        self.number = next(_numbers)
        self._map(os.memfd_create("dist_train.loader", os.MFD_CLOEXEC), size, truncate=True)
        self._lent: list[tuple[int, int]] = []  # from, to: ascending
        # By offset. They tell when no tensor is left of a region, while they are kept.
        self._references: dict[int, _RegionReference] = {}
        # Appended to by whatever thread drops a tensor, in the middle of anything: so no lock.
        self._back: deque[_RegionReference] = deque()
        self._written = 0
        _arenas[self.number] = self

    def lend(self, size: int) -> int | None:
        """The offset of a free region of ``size`` bytes, from the smallest gap that has room; None
        if there is none. Behind the last region in use is the largest gap."""
        back = {self._back.popleft().offset for _ in range(len(self._back))}
        self._lent = [region for region in self._lent if region[0] not in back]
        length = max(-(-size // PAGE), 1) * PAGE
        ends = [0, *(to for _, to in self._lent)]
        starts = [*(start for start, _ in self._lent), self.size]
        gaps = ((start - end, end) for end, start in zip(ends, starts, strict=True))
        fitting = min((gap for gap in gaps if gap[0] >= length), default=None)
        if fitting is None:
            return None
        offset = fitting[1]
        self._lent = sorted([*self._lent, (offset, offset + length)])
        end = self._lent[-1][1]
        self._written = max(self._written, end)
        if self._written > SLACK * end:
            self._memory.madvise(mmap.MADV_REMOVE, end, self._written - end)
            self._written = end
        return offset

    def view(self, offset: int, size: int) -> Volume:
        """uint8 [size] at ``offset``."""
        return np.frombuffer(self._memory, np.uint8, size, offset)

    def writable(self, offset: int, size: int) -> Volume:
        """``view``, with its pages there and mapped, for who is to write to all of it.

        Each page would be a fault else, of 3.8 us where it is new, and of 2 us where another
        process made it (measured). Written by a call and mapped by reading: 1.7 us and 0.2 us.

        Raises:
            MemoryError: there is not so much memory.
        """
        pixels = self.view(offset, size)
        pieces = self._mapped[offset // PIECE : -(-(offset + size) // PIECE)]
        if not pieces.all():
            self._make_pages(offset, offset + size)
            pixels[::FAULT_AROUND].max(initial=0)
            pieces[:] = True
        return pixels

    def _make_pages(self, start: int, end: int) -> None:
        while (hole := os.lseek(self._descriptor, start, os.SEEK_HOLE)) < end:
            zeros = [_ZEROS] * min((end - hole) // PIECE, MOST_AT_ONCE)
            try:
                start = hole + os.pwritev(self._descriptor, zeros or [_ZEROS[: end - hole]], hole)
            except OSError as error:
                if error.errno in (errno.ENOMEM, errno.ENOSPC):
                    raise MemoryError(error.strerror) from None
                # A limit on files, perhaps, which memory is not subject to otherwise.
                return

    def tensor(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        """uint8 of ``shape`` in a region that was lent, which is free again when neither it nor a
        tensor that shares its memory is left."""
        pixels = self.view(offset, int(np.prod(shape, dtype=np.int64)))
        # The tensor's storage holds this very array. The callback is a built-in method, not Python
        # code: Python drops the KeyboardInterrupt of a Ctrl-C that arrives in a callback.
        reference = _RegionReference(pixels, self._back.append)
        reference.offset = offset
        self._references[offset] = reference
        return torch.from_numpy(pixels).view(shape)

    def _map(self, descriptor: int, size: int, *, truncate: bool = False) -> None:
        weakref.finalize(self, os.close, descriptor)
        if truncate:
            os.ftruncate(descriptor, size)
        self._descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)
        # By this process. What was given back since is mapped by faults again.
        self._mapped = np.zeros(-(-size // PIECE), np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        handle = reduction.DupFd(self._descriptor)
        return {"number": self.number, "size": self.size, "handle": handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        self._map(state["handle"].detach(), state["size"])


def arena_of_memory() -> Arena | None:
    """One that can hold all that the machine's memory can; None if the system refuses it."""
    pages = os.sysconf("SC_PHYS_PAGES")
    try:
        return Arena(pages * PAGE)
    except OSError:
        return None


def lent_tensor(number: int, offset: int, shape: tuple[int, ...]) -> Tensor:
    """``Arena.tensor`` of the arena of that number, in the process that made it."""
    return _arenas[number].tensor(offset, shape)
