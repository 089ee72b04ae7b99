"""LMDB index: key -> where the clip's pixels are and what is known of it.

A value is a JSON object: ``shard`` (int), ``offset`` and ``length`` (bytes), ``shape``, ``label``,
``group``, ``weight``, ``split``, ``filename``, ``crc32c`` and more. It is derived from the shards
alone, so it can be built again whenever it is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import lmdb
import numpy as np

from dist_train.data.files import PARTIAL, crc32c, sync_folder
from dist_train.data.shards import Record, read_records
from dist_train.errors import StoreError


def write_index(path: Path, shards: Sequence[Path]) -> int:
    """Build the index of ``shards`` (whose position is their number); returns the clip count.

    Keys go in sorted and in one transaction, so equal shards give an equal file.

    Raises:
        StoreError: a key is in two shards, or a shard cannot be read.
    """
    # As bytes: records are several times as large while they are Python objects.
    values = sorted(
        (
            (key.encode(), json.dumps(record | {"shard": number}, sort_keys=True).encode())
            for number, shard in enumerate(shards)
            for key, record in read_records(shard)
        ),
        key=itemgetter(0),
    )
    size = sum(len(key) + len(value) + 64 for key, value in values)
    aside = path.with_name(path.name + PARTIAL)
    aside.unlink(missing_ok=True)
    # Pages are at worst half full; the file is only as long as the pages in use.
    with lmdb.open(str(aside), subdir=False, lock=False, map_size=4 * size + (1 << 20)) as env:
        with env.begin(write=True) as transaction:
            for key, value in values:
                if not transaction.put(key, value, overwrite=False, append=True):
                    raise StoreError(f"clip '{key.decode()}' is in two shards", where=path.parent)
        env.sync(True)
    aside.replace(path)
    sync_folder(path.parent)
    return len(values)


def read_index(path: Path) -> Iterator[tuple[str, Record]]:
    """All (key, record) entries, ordered by key.

    Raises:
        StoreError: there is no index, or it is damaged.
    """
    if not path.is_file():
        raise StoreError(
            "the store has no index",
            where=path,
            fix="Run 'dist-train finalize'; it is rebuilt from the shards.",
        )
    try:
        # LMDB must not be carried over a fork, and refuses to open a path twice in one process:
        # it is opened here for the length of one read, and closed again.
        with (
            lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env,
            env.begin() as transaction,
        ):
            # LMDB reads through a memory map, where a page that is not there kills the process.
            if path.stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                raise lmdb.CorruptedError("the file is cut short")
            for key, value in transaction.cursor():
                yield bytes(key).decode(), json.loads(bytes(value))
    except (lmdb.Error, ValueError) as error:
        raise StoreError(
            f"the index cannot be read ({error})",
            where=path,
            fix="Delete it and run 'dist-train finalize'; it is rebuilt from the shards.",
        ) from None


def index_checksum(path: Path) -> int:
    """CRC-32C of the file: LMDB has no checksums of its own.

    Raises:
        StoreError: there is no index, or it is empty.
    """
    try:
        return crc32c(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise StoreError(f"the index cannot be read ({error})", where=path) from None
