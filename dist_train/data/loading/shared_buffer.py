"""One shared memory for all batches of a loader, lent region by region.

A new shared file for each batch, as in PyTorch, costs more in page faults than filling it with
clips. Here the pages are used again.
"""

from __future__ import annotations

import errno
import itertools
import math
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
# Pages are given back when the used part of the arena exceeds the end of its last region by this
# factor.
SLACK = 2
# Bytes that one read fault maps if the pages exist (Linux's fault_around_bytes).
FAULT_AROUND = 16 * PAGE
PIECE = 256 * PAGE
_ZEROS = bytes(PIECE)
MOST_AT_ONCE = os.sysconf("SC_IOV_MAX")

_numbers = itertools.count()
# The arenas of this process, for batches that arrive from workers.
_arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()


class _RegionReference(weakref.ref[Volume]):
    """A weak reference to the array of the region at ``offset``."""

    __slots__ = ("offset",)
    offset: int


class Arena:
    """Shared memory of ``size`` bytes, of which only the pages written to take memory.

    It has no name (``memfd_create``), so nothing is left of it however its processes end, and the
    size of /dev/shm does not limit it. The process that makes it lends regions. A worker that gets
    it at its start sees the same bytes.

    Raises:
        OSError: the system refuses the address space or the file descriptor.
    """

    def __init__(self, size: int) -> None:
        self.number = next(_numbers)
        descriptor = os.memfd_create("dist_train.loader", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, size)
        self._map(descriptor, size)
        self._lent: list[tuple[int, int]] = []  # (start, end), ascending
        # By offset. They must be kept to be told when the last tensor on a region is gone.
        self._references: dict[int, _RegionReference] = {}
        # Any thread may append to it at any point of its code, so it is used without a lock.
        self._returned: deque[_RegionReference] = deque()
        self._written = 0
        _arenas[self.number] = self

    def lend(self, size: int) -> int | None:
        """Offset of a free region of ``size`` bytes, in the smallest gap that has room.

        None if no gap has room.
        """
        returned = {self._returned.popleft().offset for _ in range(len(self._returned))}
        self._lent = [region for region in self._lent if region[0] not in returned]
        length = max(-(-size // PAGE), 1) * PAGE
        ends = [0, *(end for _, end in self._lent)]
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
        """``view`` for callers that overwrite the whole region: its pages exist and are mapped.

        Otherwise each page costs a fault: 3.8 us if it is new, 2 us if another process made it.
        Made by a write and mapped by reads, a page costs 1.7 us and 0.2 us (measured).

        Raises:
            MemoryError: memory is exhausted.
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
                # For example a limit on the size of files: page faults still work.
                return

    def tensor(
        self, offset: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8
    ) -> Tensor:
        """A tensor of ``dtype`` and ``shape`` in a lent region.

        The region is free again when no tensor on its memory is left.
        """
        pixels = self.view(offset, math.prod(shape) * dtype.itemsize)
        # The tensor's storage holds this very array. The callback is built in: Python would drop a
        # KeyboardInterrupt that arrives in a callback of Python code.
        reference = _RegionReference(pixels, self._returned.append)
        reference.offset = offset
        self._references[offset] = reference
        return torch.from_numpy(pixels).view(dtype).view(shape)

    def _map(self, descriptor: int, size: int) -> None:
        self._descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)
        # Pieces that this process has mapped. Those given back since are mapped by faults again.
        self._mapped = np.zeros(-(-size // PIECE), np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        handle = reduction.DupFd(self._descriptor)
        return {"number": self.number, "size": self.size, "handle": handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        self._map(state["handle"].detach(), state["size"])


def arena_of_memory() -> Arena | None:
    """An arena of the size of the machine's memory; None if the system refuses it."""
    try:
        return Arena(os.sysconf("SC_PHYS_PAGES") * PAGE)
    except OSError:
        return None


def lent_tensor(number: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``Arena.tensor`` of the arena with this number, in the process that made it."""
    return _arenas[number].tensor(offset, shape, dtype)
