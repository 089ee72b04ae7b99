"""Stream tensors to a safetensors file, with its checksum.

The format (https://github.com/huggingface/safetensors#format): the length of the header as uint64,
little-endian; the header, JSON with dtype, shape and offsets of each tensor; then their bytes in C
order, without gaps. The library's own writer needs a second, contiguous copy of all tensors, and
gives no checksum.
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
#: Integers by size in bytes: numpy lacks some of the dtypes, but can read their bits.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Bytes of one checksum, which holds Python's lock: a tenth of a millisecond.
CHUNK = 2**20
#: Bytes of one write, and the alignment that writes past the system's cache need on any device.
STAGE, ALIGNED = 8 * 2**20, 4096
#: The flag for writes past the cache; not every system has it.
DIRECT = getattr(os, "O_DIRECT", 0)
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Sum(NamedTuple):
    """Length in bytes and crc32c of a file."""

    size: int
    crc32c: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Sum:
    """Write host tensors of any memory format to ``path``, and sync it.

    Uses one thread and little memory.

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
    """Writes a file in large aligned pieces, past the system's cache if possible.

    Copying into the cache would take more time than all else here, and push out clips that the
    training reads again, for pages that nobody reads.
    """

    def __init__(self, path: Path) -> None:
        # A killed session's file, or a link, is not written into.
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The file system has no writes past the cache.
            self._file = os.open(path, flags, 0o666)
        # A memory map begins at a page, as such writes require.
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
                if error.errno != errno.EINVAL or not self._use_cache():
                    raise
        self._written += end
        self._used = 0

    def _use_cache(self) -> bool:
        """Write through the system's cache from now on; False if it is used already."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _header(ordered: list[tuple[str, Tensor]]) -> Bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)


def _c_order(tensor: Tensor) -> Iterator[Bytes]:
    """The bytes of a tensor in C order, piece by piece, rearranged by numpy on this thread: torch
    would take cores from the training."""
    bits = tensor.detach().view(BITS[tensor.element_size()]).numpy()
    if bits.flags.c_contiguous:
        yield bits.reshape(-1).view(np.uint8)
        return
    # Pieces that stay in a core's cache, in memory that is reused.
    rows = max(1, CHUNK // max(1, bits[0].nbytes))
    for first in range(0, len(bits), rows):
        yield _contiguous(bits[first : first + rows]).reshape(-1).view(np.uint8)


def _contiguous(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy in C order."""
    if rows.ndim == 5 and rows.transpose(0, 2, 3, 4, 1).flags.c_contiguous:
        # Channels last: the kernel's axes are one axis in memory, which numpy does not notice.
        count, channels = rows.shape[:2]
        last = rows.transpose(0, 2, 3, 4, 1).reshape(count, -1, channels)
        return np.ascontiguousarray(last.transpose(0, 2, 1))
    return np.ascontiguousarray(rows)
