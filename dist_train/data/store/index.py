"""LMDB index: key -> place and metadata of a clip.

A value is a JSON object: ``shard`` (int), ``offset`` and ``length`` (bytes), ``shape``, ``label``,
``group``, ``weight``, ``split``, ``filename``, ``crc32c`` and more. The index is derived from the
shards alone, so it can be rebuilt whenever it is lost.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import lmdb

from dist_train.data.store.shards import read_records
from dist_train.data.types import Record
from dist_train.errors import FileError, StoreError
from dist_train.files import crc32c_of_file, reason_of, whole_aside
from dist_train.system.advice import blame_machine

# Number of entries that are sorted at a time, or written in one transaction: tens of megabytes.
RUN = 1 << 15
_FIX = "Run 'dist-train finalize', which rebuilds it from the shards."


def write_index(path: Path, shards: Sequence[Path]) -> int:
    """Build the index of all shards, in order of their numbers; returns the number of clips.

    Keys are inserted in order, so equal shards give an equal file. They are sorted on disk, in runs
    that are merged, so memory does not grow with their number.

    Raises:
        StoreError: a key is in two shards, or a shard cannot be read.
        OSError: the disk is full.
    """
    lines = _lines(shards)
    runs: list[IO[bytes]] = []
    size = 0
    with ExitStack() as files:
        while run := sorted(islice(lines, RUN)):
            size += sum(len(line) + 64 for line in run)
            runs.append(files.enter_context(TemporaryFile(dir=path.parent)))
            runs[-1].writelines(run)
            runs[-1].seek(0)
        # LMDB takes an empty file for a new one.
        aside = files.enter_context(whole_aside(path))
        try:
            # Pages are at worst half full; the file is only as long as the pages in use.
            map_size = 4 * size + (1 << 20)
            with lmdb.open(os.fsencode(aside), subdir=False, lock=False, map_size=map_size) as env:
                clips = _put(env, heapq.merge(*runs), path)
                env.sync(True)
        except lmdb.DiskError as error:
            raise OSError(errno.ENOSPC, str(error), str(path)) from None
    return clips


def _lines(shards: Sequence[Path]) -> Iterator[bytes]:
    """Yield key, tab and value of each entry. Keys have no tab, so lines sort like keys."""
    for number, shard in enumerate(shards):
        for key, record in read_records(shard):
            yield f"{key}\t{json.dumps(record | {'shard': number}, sort_keys=True)}\n".encode()


def _put(env: lmdb.Environment, lines: Iterator[bytes], path: Path) -> int:
    clips = 0
    while part := list(islice(lines, RUN)):
        with env.begin(write=True) as transaction:
            for line in part:
                key, value = line.rstrip(b"\n").split(b"\t")
                if not transaction.put(key, value, overwrite=False, append=True):
                    raise StoreError(f"clip '{key.decode()}' is in two shards", where=path.parent)
        clips += len(part)
    return clips


def read_index(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield all (key, record) entries, ordered by key.

    Raises:
        StoreError: there is no index, or it is damaged.
    """
    with _reading(path) as transaction:
        for key, value in transaction.cursor():
            yield bytes(key).decode(), json.loads(bytes(value))


def look_up(path: Path, keys: Iterable[str]) -> dict[str, Record]:
    """Return the records of the ``keys`` that the index has.

    Raises:
        StoreError: there is no index, or it is damaged.
    """
    with _reading(path) as transaction:
        found = {key: transaction.get(key.encode()) for key in keys}
        return {key: json.loads(bytes(v)) for key, v in found.items() if v is not None}


@contextmanager
def _reading(path: Path) -> Iterator[lmdb.Transaction]:
    try:
        # LMDB must not be carried over a fork, and refuses to open a path twice in one process:
        # it is opened here for the length of one read, and closed again.
        with (
            lmdb.open(os.fsencode(path), subdir=False, lock=False, readonly=True) as env,
            env.begin() as transaction,
        ):
            yield transaction
    except (lmdb.Error, ValueError) as error:
        # LMDB's own errors have negative numbers; others are the operating system's.
        code = getattr(error, "code", None) or 0
        raise _unreadable(path, OSError(code, os.strerror(code)) if code > 0 else error) from None


def index_checksum(path: Path) -> int:
    """Return the CRC-32C of the file, as LMDB has no checksums of its own.

    Raises:
        StoreError: there is no index.
    """
    try:
        return crc32c_of_file(path)
    except (OSError, FileError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> StoreError:
    blame_machine(error, path)
    return StoreError(f"the index cannot be read ({reason_of(error)})", where=path, fix=_FIX)


def check_index(path: Path, checksum: int) -> None:
    """Check the CRC-32C of the index.

    LMDB trusts what it maps: flipped bits would be trained on, or end the process. So each process
    checks an index before it opens it, which takes less time than reading it.

    Raises:
        StoreError: the index is missing, or has another checksum.
    """
    if index_checksum(path) != checksum:
        raise StoreError("the index is damaged: its checksum is wrong", where=path, fix=_FIX)


def content_digest(path: Path) -> str:
    """Identity of the clips of an index: SHA-256, in hex, over key, label and CRC-32C of each.

    Raises:
        StoreError: there is no index, or it is damaged.
    """
    return digest_of(read_index(path))


def digest_of(records: Iterable[tuple[str, Record]]) -> str:
    """``content_digest`` of (key, record) entries, which are ordered by the keys' bytes."""
    digest = hashlib.sha256()
    for key, record in records:
        digest.update(f"{key},{record['label']},{record['crc32c']}\n".encode())
    return digest.hexdigest()
