"""Tensors streamed to a safetensors file, and checksums of files of any size.

The format (https://github.com/huggingface/safetensors#format): the length of the header as uint64,
little-endian; the header, JSON with dtype, shape and place of each tensor; then their bytes in C
order, without gaps. The library's own writer takes all tensors as contiguous bytes at once, a
second copy of a whole checkpoint, and gives no checksum.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
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
#: The checksum holds Python's lock, so a writing thread works in pieces of a tenth of a millisecond.
CHUNK = 2**20
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Sum(NamedTuple):
    """Length in bytes, and crc32c."""

    size: int
    crc32c: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Sum:
    """Write host tensors of any memory format to ``path``, and sync it.

    Works on one thread, and holds the bytes of at most two tensors a second time.

    Raises:
        OSError: the file cannot be written.
    """
    # The largest elements first, so that every tensor is aligned when the file is mapped.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    size = crc = 0
    with path.open("wb") as file:
        for content in chain([_header(ordered)], (_c_order(tensor) for _, tensor in ordered)):
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                crc = google_crc32c.extend(crc, chunk)
                file.write(chunk)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return Sum(size, crc)


def sum_of_file(path: Path) -> Sum:
    """Read a file once, a piece at a time.

    Raises:
        OSError: it cannot be read.
    """
    size = crc = 0
    held = np.empty(CHUNK, np.uint8)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(memoryview(held)):
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


def _c_order(tensor: Tensor) -> Bytes:
    """The bytes of a tensor in C order. numpy rearranges them on this thread alone, where
    torch would take cores from the training."""
    bits = tensor.detach().view(BITS[tensor.element_size()]).numpy()
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
