"""The good clips of a damaged shard."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from dist_train.data.store.shards import Form, form_of, read_sample, to_record, without_place
from dist_train.data.types import Record, Volume
from dist_train.errors import FileError, StoreError
from dist_train.files import crc32c, open_plain
from dist_train.system.advice import blame_machine


def good_clips(
    path: Path, rows: Sequence[Record], form: Form, index: Mapping[str, Record] | None = None
) -> dict[int, Record]:
    """Return the records, with offset and length, of a shard's good clips by position in ``rows``.

    A clip is good if its pixels have the CRC-32C of its record, and its record agrees with the
    manifest, with the store's dtype and channels, and with the index if that is given. Headers may
    be damaged: a sample is looked for at each block of the tar file, and where the index has it.

    Args:
        rows: the shard's rows of the manifest.
        index: records by key, of an index that is sound.

    Raises:
        MachineError: the machine is at fault, such as a disk that fails.
    """
    positions = {row["key"]: position for position, row in enumerate(rows)}
    good: dict[int, Record] = {}
    try:
        with open_plain(path) as file:
            for key, record in chain(_samples(file), (index or {}).items()):
                position = positions.get(key)
                if position is None or position in good:
                    continue
                agrees = to_record(rows[position]).items() <= record.items()
                agrees &= form_of(record) == form
                if index is not None:
                    agrees &= without_place(record) == without_place(index.get(key, {}))
                if agrees and _pixels(file, record) is not None:
                    good[position] = record
    except (OSError, FileError) as error:
        blame_machine(error, path)
    return good


def read_good(path: Path, record: Record) -> Volume:
    """Return the pixels of a clip that ``good_clips`` found.

    Raises:
        StoreError: they have changed since.
    """
    with open_plain(path) as file:
        pixels = _pixels(file, record)
    if pixels is None:
        raise StoreError("changed while it was read", where=path, fix="Check the disk.")
    return pixels.view(form_of(record)[0]).reshape(record["shape"])


def _samples(file: IO[bytes]) -> Iterator[tuple[str, Record]]:
    """Yield every readable sample, at whichever block it begins."""
    at, size = 0, os.fstat(file.fileno()).st_size
    while at < size:
        try:
            sample = read_sample(file, at, size)
        except (tarfile.TarError, ValueError):
            sample = None
        if sample is None:
            at += tarfile.BLOCKSIZE
        else:
            key, record, at = sample
            yield key, record


def _pixels(file: IO[bytes], record: Record) -> np.ndarray | None:
    """uint8 [length]; None if their checksum is wrong."""
    file.seek(record["offset"])
    pixels = np.frombuffer(file.read(record["length"]), np.uint8)
    good = len(pixels) == record["length"] and crc32c(pixels) == record["crc32c"]
    return pixels if good else None
