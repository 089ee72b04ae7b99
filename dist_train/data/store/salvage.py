"""The clips of a shard that are still good, whatever else of the shard is damaged."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dist_train.data.store.shards import read_sample, to_record
from dist_train.data.types import Record, Volume
from dist_train.errors import FileError, StoreError
from dist_train.files import crc32c, open_plain

# Entries of a record that say where the clip is, not what it is.
PLACE = ("offset", "length", "shard")
# Entries that ``write_shard`` adds to a record.
ADDED = ("shape", "crc32c")


def good_clips(
    path: Path, rows: Sequence[Record], index: Mapping[str, Record] | None = None
) -> dict[int, Record]:
    """The good clips of a shard by their positions in ``rows``: records with offset and length.

    A clip is good if its pixels have the CRC-32C of its record, and its record is what the manifest
    says, and what the index says if that is given. Headers may be damaged: a sample is looked for
    at each block of the tar file, and where the index has it.

    Args:
        rows: the shard's rows of the manifest.
        index: records by key, of an index that is sound.
    """
    positions = {row["key"]: position for position, row in enumerate(rows)}
    good: dict[int, Record] = {}
    try:
        with open_plain(path) as file:
            for key, record in (*_samples(file), *(index or {}).items()):
                position = positions.get(key)
                if (
                    position is not None
                    and position not in good
                    and to_record(rows[position]).items() <= record.items()
                    and (index is None or (key in index and same(record, index[key])))
                    and _pixels(file, record) is not None
                ):
                    good[position] = record
    except (OSError, FileError):
        return good
    return good


def same(one: Record, other: Record) -> bool:
    """Whether two records are of the same clip, wherever in a shard it is."""
    return _without(one, PLACE) == _without(other, PLACE)


def facts_of(record: Record, row: Record) -> Record:
    """What a record holds beside its row of the manifest, and beside what ``write_shard`` adds."""
    return _without(record, (*to_record(row), *ADDED, *PLACE))


def read_good(path: Path, record: Record) -> Volume:
    """The pixels of a clip of ``good_clips``, uint8 [D, H, W].

    Raises:
        StoreError: they are no longer what they were.
    """
    with open_plain(path) as file:
        pixels = _pixels(file, record)
    if pixels is None:
        raise StoreError("changed while it was read", where=path, fix="Check the disk.")
    return pixels.reshape(record["shape"])


def _samples(file: IO[bytes]) -> Iterator[tuple[str, Record]]:
    """All samples that can be read, at whichever block they begin."""
    at, size = 0, os.fstat(file.fileno()).st_size
    while at < size:
        try:
            sample = read_sample(file, at, size)
        except (tarfile.TarError, ValueError):
            sample = None
        if sample is None:
            at += tarfile.BLOCKSIZE
            continue
        key, record, at = sample
        yield key, record


def _pixels(file: IO[bytes], record: Record) -> np.ndarray | None:
    """uint8 [length]; None if they do not have their checksum."""
    file.seek(record["offset"])
    pixels = np.frombuffer(file.read(record["length"]), np.uint8)
    whole = len(pixels) == record["length"] and crc32c(pixels) == record["crc32c"]
    return pixels if whole else None


def _without(record: Record, names: Sequence[str]) -> Record:
    return {name: value for name, value in record.items() if name not in names}
