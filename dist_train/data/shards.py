"""WebDataset tar shards with deterministic bytes (https://github.com/webdataset/webdataset).

A clip is one sample of two members, in this order:

    <key>.npy    uint8 [D, H, W], C order, NPY format 1.0
    <key>.json   its record: label, group, source file, shape, crc32c of the array's bytes

Tar headers carry no time, owner or mode that depends on who wrote them (POSIX ustar).
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from dist_train.data.files import crc32c, written_whole
from dist_train.data.types import Volume
from dist_train.errors import StoreError
from dist_train.os_advice import blame_machine

Record = dict[str, Any]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[tuple[str, Volume, Record]]) -> None:
    """Write (key, clip, record) samples as one shard that appears whole or not at all.

    ``shape`` and ``crc32c`` are added to each record.
    """
    with (
        written_whole(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, clip, record in samples:
            pixels = np.ascontiguousarray(clip)
            full = record | {"shape": list(pixels.shape), "crc32c": crc32c(pixels)}
            _add(tar, f"{key}.npy", _npy_header(pixels), pixels.data.cast("B"))
            _add(tar, f"{key}.json", json.dumps(full, sort_keys=True).encode())


def _npy_header(pixels: Volume) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(pixels))
    return header.getvalue()


def _add(tar: tarfile.TarFile, name: str, *parts: bytes | memoryview) -> None:
    header = tarfile.TarInfo(name)
    header.size = sum(len(part) for part in parts)
    # TarFile asks of a file no more than this.
    tar.addfile(header, cast(IO[bytes], _Parts(parts)))


class _Parts:
    """Reads several buffers as one file, so that a large clip is not copied to go into a shard."""

    def __init__(self, parts: Iterable[bytes | memoryview]) -> None:
        self.left = [memoryview(part) for part in parts]

    def read(self, size: int) -> bytes:
        taken: list[memoryview] = []
        while size and self.left:
            taken.append(self.left[0][:size])
            size -= len(taken[-1])
            self.left[0] = self.left[0][len(taken[-1]) :]
            if not self.left[0]:
                del self.left[0]
        return b"".join(taken)


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The samples of a shard without their pixels: (key, record).

    ``offset`` (bytes from the start of the shard to the first pixel) and ``length`` (bytes of
    pixels) are added to each record.

    Raises:
        StoreError: the shard is not a tar file in the form that ``write_shard`` gives.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            members = iter(tar)
            for array in members:
                record = next(members, None)
                key = array.name.removesuffix(".npy")
                if record is None or record.name != f"{key}.json":
                    raise StoreError(f"'{array.name}' has no record after it", where=path)
                content = tar.extractfile(record)
                assert content is not None
                full: Record = json.loads(content.read())
                length = int(np.prod(full["shape"], dtype=np.int64))
                offset = array.offset_data + array.size - length
                yield key, full | {"offset": offset, "length": length}
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
        blame_machine(error, path)
        raise StoreError(
            f"is not a readable shard ({error})",
            where=path,
            fix="Delete it and run 'dist-train prepare' again with the same settings.",
        ) from None
