"""Tensors streamed to a safetensors file, and checksums of files of any size.

The format (https://github.com/huggingface/safetensors#format): the length of the header as uint64,
little-endian; the header, JSON with dtype, shape and place of each tensor; then their bytes in C
order, without gaps. The library's own writer takes all tensors as contiguous bytes at once, a
second copy of a whole checkpoint, and gives no checksum.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: Integers of each size, as which numpy can see the bits of every dtype.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: The checksum holds Python's lock, so the writing thread's pieces take a tenth of a millisecond.
CHUNK = 2**20
#: Bytes of one write; a multiple of what any device asks of writes that pass the system's cache by.
STAGE, ALIGNED = 8 * 2**20, 4096
#: The flag for such writes; not every system has it.
DIRECT = getattr(os, "O_DIRECT", 0)
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Sum(NamedTuple):
    """Length in bytes, and crc32c."""

    size: int
    crc32c: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Sum:
    """Write host tensors of any memory format to ``path``, and sync it.

    Works on one thread, and holds little memory of its own.

    Raises:
        OSError: the file cannot be written.
    """
    # The largest elements first, so that every tensor is aligned when the file is mapped.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    pieces = (piece for _, tensor in ordered for piece in _c_order(tensor))
    with _Stage(path) as stage:
        for content in chain([_header(ordered)], pieces):
            stage.add(content)
        return stage.finish()


class _Stage:
    """A file that is written in large aligned pieces, past the system's cache where that can be.

    The cache would cost a core more time than all else here, and push out clips that the training
    reads again, for pages that nobody reads.
    """

    def __init__(self, path: Path) -> None:
        # What a killed session left there, or a link: neither is written into.
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The file system has no such writes.
            self._file = os.open(path, flags, 0o666)
        # Begins at a page, as such writes ask.
        self._memory = mmap.mmap(-1, STAGE)
        self._bytes: Bytes = np.frombuffer(self._memory, np.uint8)
        self._used = self._written = self._crc = 0

    def add(self, content: Bytes) -> None:
        while len(content):
            part, content = np.split(content, [min(CHUNK, STAGE - self._used)])
            end = self._used + len(part)
            self._bytes[self._used : end] = part
            self._crc = google_crc32c.extend(self._crc, self._bytes[self._used : end])
            self._used = end
            if end == STAGE:
                self._write(end)

    def finish(self) -> Sum:
        """Write the rest, and sync."""
        size = self._written + self._used
        padded = -(-self._used // ALIGNED) * ALIGNED
        self._bytes[self._used : padded] = 0
        self._write(padded)
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        return Sum(size, self._crc)

    def _write(self, end: int) -> None:
        begin = 0
        while begin < end:
            try:
                begin += os.write(self._file, self._bytes[begin:end].data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._to_the_cache():
                    raise
        self._written += end
        self._used = 0

    def _to_the_cache(self) -> bool:
        """Write through the system's cache from here on; False where that is so already."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def sum_of_file(path: Path) -> Sum:
    """Read a file once, a piece at a time.

    Raises:
        OSError: it cannot be read.
    """
    size = crc = 0
    held = np.empty(CHUNK, np.uint8)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(held.data):
            crc = google_crc32c.extend(crc, held[:read])
            size += read
    return Sum(size, crc)


def _header(ordered: list[tuple[str, Tensor]]) -> Bytes:
    places: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        places[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(places, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)


def _c_order(tensor: Tensor) -> Iterator[Bytes]:
    """The bytes of a tensor in C order, piece by piece. numpy rearranges them on this thread alone,
    where torch would take cores from the training."""
    bits = tensor.detach().view(BITS[tensor.element_size()]).numpy()
    if bits.flags.c_contiguous:
        yield bits.reshape(-1).view(np.uint8)
        return
    # Rows that stay in a core's cache, and in memory that is used again.
    rows = max(1, CHUNK // max(1, bits[0].nbytes))
    for first in range(0, len(bits), rows):
        yield _contiguous(bits[first : first + rows]).reshape(-1).view(np.uint8)


def _contiguous(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy in C order."""
    if rows.ndim == 5 and rows.transpose(0, 2, 3, 4, 1).flags.c_contiguous:
        # Channels last: the axes of the kernel are one in memory, which numpy does not see.
        count, channels = rows.shape[:2]
        last = rows.transpose(0, 2, 3, 4, 1).reshape(count, -1, channels)
        return np.ascontiguousarray(last.transpose(0, 2, 1))
    return np.ascontiguousarray(rows)
