"""Named arrays of one axis in a file that processes map: safetensors, with checksums.

The format (https://github.com/huggingface/safetensors#format): the length of the header as uint64,
little-endian; the header, JSON with dtype, shape and offsets of each array; then their bytes
without gaps. The CRC-32C of each array is in the header's metadata, so the checksum of the header
vouches for every byte. The library's own writer needs all arrays in memory, and its reader copies
them.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from json import dumps
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

import google_crc32c
import numpy as np

from dist_train.errors import FileError
from dist_train.files import MIB, crc32c, open_plain, parse_object
from dist_train.system.advice import blame_machine

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Some 50,000 columns.
MOST_HEADER = 16 * MIB
Array = np.ndarray[Any, np.dtype[Any]]


class Pieces(Protocol):
    """An array that is written piece by piece."""

    dtype: np.dtype[Any]

    def __len__(self) -> int: ...
    def pieces(self) -> Iterable[Array]: ...


class Spool:
    """An array that grows in a nameless file, or in memory without ``folder``."""

    def __init__(self, folder: Path | None, dtype: np.dtype[Any]) -> None:
        self.dtype, self._length = dtype, 0
        self._file: IO[bytes] = io.BytesIO()
        if folder is not None:
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115

    def append(self, values: Array) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self._length += len(values)

    def __len__(self) -> int:
        return self._length

    def pieces(self) -> Iterator[Array]:
        self._file.seek(0)
        while content := self._file.read(MIB):
            yield np.frombuffer(content, self.dtype)

    def close(self) -> None:
        self._file.close()


class _Whole:
    """An array in memory, as ``Pieces``."""

    def __init__(self, array: Array) -> None:
        self.dtype, self._array = array.dtype, array

    def __len__(self) -> int:
        return len(self._array)

    def pieces(self) -> Iterator[Array]:
        step = MIB // self.dtype.itemsize
        for first in range(0, len(self._array), step):
            yield np.ascontiguousarray(self._array[first : first + step])


def write_arrays(file: IO[bytes], arrays: Mapping[str, Array | Pieces]) -> int:
    """Write arrays to an empty file; returns the CRC-32C of the header.

    Raises:
        OSError: the file cannot be written.
    """
    sources = {n: _Whole(a) if isinstance(a, np.ndarray) else a for n, a in arrays.items()}
    # The largest elements first, so that every array is aligned.
    ordered = sorted(sources.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    sums = dict.fromkeys(sources, 0)
    file.write(_header(ordered, sums))
    for name, source in ordered:
        for piece in source.pieces():
            file.write(piece.data)
            sums[name] = google_crc32c.extend(sums[name], piece.view(np.uint8))
    header = _header(ordered, sums)
    file.seek(0)
    file.write(header)
    return crc32c(header)


def _header(ordered: list[tuple[str, Pieces]], sums: Mapping[str, int]) -> bytes:
    """The header and its length; its size does not depend on the sums."""
    entries: dict[str, Any] = {"__metadata__": {n: f"{crc:08x}" for n, crc in sums.items()}}
    end = 0
    for name, source in ordered:
        begin, end = end, end + len(source) * source.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[source.dtype],
            "shape": [len(source)],
            "data_offsets": [begin, end],
        }
    text = dumps(entries, separators=(",", ":"), sort_keys=True).encode()
    # The arrays begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ArrayFile:
    """The arrays of a file, mapped, so that the processes of a machine share them. It is pickled as
    the file's path.

    Opening checks the header, whatever the size of the arrays. An array is checked when a process
    uses it first.

    Args:
        source: the file's path, or its content.
        header_crc32c: as ``write_arrays`` returned it; None if it is not known.

    Raises:
        FileError: the file cannot be read, or is damaged.
    """

    def __init__(self, source: Path | bytes, header_crc32c: int | None = None) -> None:
        self._source, self._header_crc32c = source, header_crc32c
        self._checked: set[str] = set()
        try:
            self._map = source if isinstance(source, bytes) else _mapped(source)
            self._arrays, self._sums, self.header_crc32c = _parse(self._map)
            if header_crc32c not in (None, self.header_crc32c):
                raise ValueError("its header is not the one that was written")
        except OSError as error:
            blame_machine(error, source)
            raise FileError(f"cannot be read ({error.strerror})", where=self._where) from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise FileError(f"is damaged ({error})", where=self._where) from None

    @property
    def _where(self) -> Path | None:
        return self._source if isinstance(self._source, Path) else None

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def unchecked(self, name: str) -> Array:
        """An array whose bytes may be damaged: for values that are checked elsewhere."""
        return self._arrays[name]

    def __getitem__(self, name: str) -> Array:
        """An array, read-only.

        Raises:
            FileError: its bytes are not those that were written.
        """
        if name not in self._checked:
            array = self._arrays[name]
            crc, step = 0, MIB // array.dtype.itemsize
            for first in range(0, len(array), step):
                crc = google_crc32c.extend(crc, array[first : first + step].view(np.uint8))
            if crc != self._sums[name]:
                raise FileError(f"is damaged (the checksum of '{name}')", where=self._where)
            if isinstance(self._map, mmap.mmap) and array.nbytes > MIB:
                # The pages stay in the system's cache; this process needs few of them.
                with suppress(OSError, ValueError, AttributeError):
                    self._map.madvise(mmap.MADV_DONTNEED)
            self._checked.add(name)
        return self._arrays[name]

    def check(self) -> None:
        """Check all arrays.

        Raises:
            FileError: a byte is not as it was written.
        """
        for name in self._arrays:
            self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayFile, (self._source, self._header_crc32c)


def _mapped(path: Path) -> mmap.mmap:
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size < 8:
            raise ValueError("it is cut short")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _parse(content: bytes | mmap.mmap) -> tuple[dict[str, Array], dict[str, int], int]:
    """The arrays, their checksums, and that of the header; errors of many kinds if the content is
    not of the format."""
    (length,) = struct.unpack("<Q", content[:8])
    if length > MOST_HEADER or len(content) < 8 + length:
        raise ValueError("it is cut short, or no file of arrays")
    entries = parse_object(content[8 : 8 + length])
    sums = {name: int(text, 16) for name, text in entries.pop("__metadata__").items()}
    arrays, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (count,), (begin, stop) = DTYPES[entry["dtype"]], *map(entry.get, _PLACE)
        if begin != end or stop - begin != count * dtype.itemsize or (8 + length) % 8:
            raise ValueError(f"'{name}' has no valid place")
        end = stop
        arrays[name] = (dtype, count, 8 + length + begin)
    if sums.keys() != arrays.keys() or len(content) != 8 + length + end:
        raise ValueError("its length is not what its header says")
    header = crc32c(bytes(content[: 8 + length]))
    return {n: np.frombuffer(content, *where) for n, where in arrays.items()}, sums, header


_PLACE = ("shape", "data_offsets")
