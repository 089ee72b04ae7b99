"""WebDataset tar shards with deterministic bytes (https://github.com/webdataset/webdataset).

A clip is one sample of two members, in this order:

    <key>.npy    uint8, uint16 or float16 (little-endian), [D, H, W], or [D, H, W, C] with several
                 channels; C order, NPY format 1.0
    <key>.json   its record: label, group, source file, shape, crc32c of the array's bytes

Tar headers carry no time, owner or mode that depends on who wrote them (POSIX ustar).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dist_train.data.types import DTYPES, METADATA, SAFE_KEY, Record, Volume, metadata_columns
from dist_train.errors import FileError, StoreError
from dist_train.files import crc32c, open_plain, parse_json, reason_of, written_whole
from dist_train.system.advice import blame_machine

# Largest record in bytes. Real ones have some hundreds.
MOST_RECORD = 1 << 20
# Entries of a record that say where the clip is. They are not stored in the shard.
PLACE = ("offset", "length", "shard")
# The dtype and the number of channels that all clips of a store have.
Form = tuple[np.dtype[Any], int]
# The names of a shard's two files.
SHARD_FILE = re.compile(r"shard-[0-9]{6,}\.(tar|rejected\.csv)")
REPAIR = "Run 'dist-train verify' with --repair, which rebuilds damaged shards."


@dataclass(frozen=True)
class Shard:
    """The two files of a shard, which may not exist yet."""

    number: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / shard_name(self.number)

    @property
    def rejects_path(self) -> Path:
        return self.path.with_suffix(".rejected.csv")

    def is_written(self) -> bool:
        return self.path.is_file() and self.rejects_path.exists()


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def to_record(row: Record) -> Record:
    """The part of a clip's record that comes from its row of the manifest."""
    crowd = row["crowd_score"]
    further = metadata_columns(row)
    known = {name: row[name] for name in row if name != "key" and name not in further}
    metadata = {name.removeprefix(METADATA): row[name] for name in further}
    record = known | {"crowd_score": None if math.isnan(crowd) else crowd}
    return record | {"metadata": metadata} if metadata else record


def without_place(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in PLACE}


def form_of(record: Record) -> Form:
    """The dtype and the number of channels of a clip."""
    _, _, _, *channels = record["shape"]
    return DTYPES[record.get("dtype", "uint8")], math.prod(channels)


def form_text(form: Form) -> str:
    return f"{form[0].name} of {form[1]} channel{'s' if form[1] > 1 else ''}"


def check_form(key: str, record: Record, form: Form, path: Path) -> None:
    """Raise StoreError unless a clip of the shard ``path`` has this form."""
    if form_of(record) != form:
        raise StoreError(
            f"clip '{key}' is {form_text(form_of(record))}, the store {form_text(form)}",
            where=path,
            fix=REPAIR,
        )


def write_shard(path: Path, samples: Iterable[tuple[str, Volume, Record]]) -> None:
    """Write (key, clip, record) samples as one shard that appears whole or not at all.

    ``shape``, ``crc32c`` and ``dtype`` (unless it is uint8) are added to each record.

    Raises:
        StoreError: a clip has another dtype or number of channels than the first.
    """
    end, first = 0, None
    with written_whole(path) as file:
        for key, clip, record in samples:
            pixels = np.ascontiguousarray(clip, DTYPES[clip.dtype.name])
            full = record | {"shape": list(pixels.shape), "crc32c": crc32c(pixels)}
            if pixels.dtype != np.uint8:
                full |= {"dtype": pixels.dtype.name}
            first = first or form_of(full)
            check_form(key, full, first, path)
            before, after = around_pixels(key, full)
            # In three parts, so that a large clip is not copied.
            end += sum(file.write(part) for part in (before, pixels.data, after))
        file.write(bytes(archive_size(end) - end))


def around_pixels(key: str, record: Record) -> tuple[bytes, bytes]:
    """Return the bytes of a sample before its first pixel, and after its last one."""
    shape, dtype = tuple(record["shape"]), form_of(record)[0]
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        npy, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    size = len(npy.getvalue()) + math.prod(shape) * dtype.itemsize
    text = json.dumps(without_place(record), sort_keys=True).encode()
    return (
        _header(f"{key}.npy", size) + npy.getvalue(),
        bytes(padded(size) - size)
        + _header(f"{key}.json", len(text))
        + text.ljust(padded(len(text)), b"\0"),
    )


def _header(name: str, size: int) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = size
    return header.tobuf(tarfile.USTAR_FORMAT)


def archive_size(end: int) -> int:
    """Number of bytes of a shard whose last sample ends at ``end``.

    Two empty blocks end an archive, which is padded to whole records of 20 blocks.
    """
    return -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (key, record) of each sample of a shard, without reading the pixels.

    ``offset`` (bytes from the start of the shard to the first pixel) and ``length`` (bytes of
    pixels) are added to each record.

    Raises:
        StoreError: the shard is not a tar file of the form that ``write_shard`` gives, or its clips
            differ in dtype or number of channels.
    """
    try:
        with open_plain(path) as file:
            at, size, first = 0, os.fstat(file.fileno()).st_size, None
            while sample := read_sample(file, at, size):
                key, record, at = sample
                first = first or form_of(record)
                check_form(key, record, first, path)
                yield key, record
    except (FileError, OSError, tarfile.TarError, ValueError) as error:
        blame_machine(error, path)
        raise StoreError(
            f"is not a readable shard ({reason_of(error)})", where=path, fix=REPAIR
        ) from None


def read_sample(file: IO[bytes], at: int, size: int) -> tuple[str, Record, int] | None:
    """Read the sample that begins at byte ``at`` of a shard of ``size`` bytes.

    Returns:
        The key, the record with ``offset`` and ``length``, and where the next sample begins; None
        at the end of the archive.

    Raises:
        tarfile.TarError, ValueError: there is no valid sample.
    """
    if is_end(file, at):
        return None
    name, begin, length = member(file, at, size)
    key, end = name.removesuffix(".npy"), begin + length
    if key == name or not SAFE_KEY.fullmatch(key):
        raise ValueError(f"'{name}' is no name of a clip")
    record_name, record_begin, record_length = member(file, padded(end), size)
    if record_name != f"{key}.json":
        raise ValueError(f"'{name}' has no record after it")
    if record_length > MOST_RECORD:
        raise ValueError(f"the record of '{name}' is longer than {MOST_RECORD} bytes")
    file.seek(record_begin)
    record = parse_json(file.read(record_length))
    if not isinstance(record, dict):
        raise ValueError(f"the record of '{name}' is no object")
    shape, crc = record.get("shape"), record.get("crc32c")
    sizes = shape if isinstance(shape, list) else []
    if (
        len(sizes) not in (3, 4)
        or not all(type(n) is int and n > 0 for n in sizes)
        or sizes[3:] == [1]
    ):
        raise ValueError(f"the record of '{name}' has no shape [D, H, W] or [D, H, W, C]")
    if str(record.get("dtype", "uint8")) not in DTYPES:
        raise ValueError(f"the record of '{name}' has no known dtype")
    if type(crc) is not int or not 0 <= crc < 1 << 32:
        raise ValueError(f"the record of '{name}' has no crc32c")
    pixels = math.prod(sizes) * form_of(record)[0].itemsize
    if pixels > length:
        raise ValueError(f"'{name}' is shorter than its shape")
    place = {"offset": end - pixels, "length": pixels}
    return key, record | place, padded(record_begin + record_length)


def is_end(file: IO[bytes], at: int) -> bool:
    """Whether the archive ends at byte ``at``."""
    file.seek(at)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def member(file: IO[bytes], at: int, size: int) -> tuple[str, int, int]:
    """Name, begin and length in bytes of the file whose tar header is at ``at``."""
    file.seek(at)
    header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
    begin = at + tarfile.BLOCKSIZE
    if not header.isreg() or header.size < 0:
        raise ValueError(f"'{header.name}' is not a plain file")
    if begin + header.size > size:
        raise ValueError(f"'{header.name}' is cut short")
    return header.name, begin, header.size


def padded(end: int) -> int:
    return -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
