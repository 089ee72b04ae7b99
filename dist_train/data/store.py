"""A finished store: its clip table, and any clip by one ``pread``."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.data.files import crc32c
from dist_train.data.index import read_index
from dist_train.data.shards import shard_name
from dist_train.data.types import Volume
from dist_train.errors import StoreError

FORMAT = "dist_train store 1"
MARKER = "store.json"
INDEX = "index.lmdb"
SHARDS = "shards"
REJECTED = "rejected.csv"

# Shards that are kept open at once: a large store has more of them than a process may open files.
OPEN_SHARDS = 256

COLUMNS = ("filename", "label", "group", "weight", "split", "crowd_score", "tier1")


class Store:
    """Read access to a store.

    ``table`` has one row a clip, ordered by key, with a clip's position in it as its id: ``key``,
    the manifest's columns, ``frames``, ``height``, ``width``, ``shard``, ``offset``, ``crc32c``.
    ``info`` is the content of ``store.json``. Safe to pickle into, or fork into, worker processes:
    a ``pread`` moves no shared file position, and a pickled store opens its own files. Not to be
    shared by threads.

    Raises:
        StoreError: no store, or one that is not finished, or whose index does not match it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = read_marker(folder)
        rows = []
        for key, record in read_index(folder / INDEX):
            frames, height, width = record["shape"]
            rows.append(
                {"key": key, "frames": frames, "height": height, "width": width}
                | {name: record[name] for name in (*COLUMNS, "shard", "offset", "crc32c")}
            )
        if len(rows) != self.info["clips"]:
            raise StoreError(
                f"the index holds {len(rows)} clips, the store {self.info['clips']}",
                where=folder / INDEX,
                fix="Delete it and run 'dist-train finalize'; it is rebuilt from the shards.",
            )
        self.table = pd.DataFrame(rows).astype({"crowd_score": "float64"})
        self._shard = self.table["shard"].to_numpy(np.int64)
        self._offset = self.table["offset"].to_numpy(np.int64)
        self._shape = self.table[["frames", "height", "width"]].to_numpy(np.int64)
        self._crc32c = self.table["crc32c"].to_numpy(np.uint32)
        # Shard number to file descriptor, least recently used first.
        self._descriptors: dict[int, int] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of what it was made from: names, settings and decoder path, not pixels."""
        return str(self.info["fingerprint"])

    @cached_property
    def content(self) -> str:
        """Identity of what it holds: SHA-256, in hex, over key, label and checksum of each clip."""
        table = self.table[["key", "label", "crc32c"]]
        return hashlib.sha256(table.to_csv(index=False, header=False).encode()).hexdigest()

    def read(self, clip: int) -> Volume:
        """The native crop of clip number ``clip``: uint8 [D, H, W], one ``pread``.

        Raises:
            StoreError: there is no such clip, the shard is gone, or the bytes are not those that
                were written.
        """
        self._check(clip)
        pixels = np.empty(self._shape[clip], dtype=np.uint8)
        self.read_into(pixels, clip)
        return pixels

    def read_into(self, out: Volume, clip: int) -> None:
        """The same, into ``out``: uint8, C order, as many pixels as the clip has."""
        self._check(clip)
        if out.dtype != np.uint8 or not out.flags.c_contiguous or out.size != self._length(clip):
            raise StoreError(
                f"clip {clip} is not to be read into {out.dtype} {list(out.shape)}: it has "
                f"{self._length(clip)} pixels, uint8 in C order",
                where=self.folder,
            )
        try:
            read = os.preadv(self._descriptor(clip), [out.data], int(self._offset[clip]))
        except OSError as error:
            raise self._damage(clip, error.strerror or str(error)) from None
        if read != out.size or crc32c(out) != self._crc32c[clip]:
            raise self._damage(clip, "the bytes are not those that were stored")

    def clip_of(self, key: str) -> int:
        """The number of the clip with this key."""
        found = np.flatnonzero(self.table["key"].to_numpy() == key)
        if not len(found):
            raise StoreError(f"holds no clip '{key}'", where=self.folder)
        return int(found[0])

    def _check(self, clip: int) -> None:
        # A number below 0 would be taken from the end.
        if not 0 <= clip < len(self.table):
            raise StoreError(
                f"holds no clip {clip}; they are 0 to {len(self.table) - 1}", where=self.folder
            )

    def _length(self, clip: int) -> int:
        return int(self._shape[clip].prod())

    def _descriptor(self, clip: int) -> int:
        shard = int(self._shard[clip])
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            if len(self._descriptors) == OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(self.folder / SHARDS / shard_name(shard), os.O_RDONLY)
        self._descriptors[shard] = descriptor
        return descriptor

    def _damage(self, clip: int, what: str) -> StoreError:
        return StoreError(
            f"clip '{self.table['key'].iloc[clip]}' cannot be read ({what})",
            where=self.folder / SHARDS / shard_name(int(self._shard[clip])),
            fix="Run 'dist-train verify' with --repair, which rebuilds damaged shards.",
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}


def read_marker(folder: Path) -> dict[str, Any]:
    """``store.json``, which ``prepare`` writes last.

    Raises:
        StoreError: it is missing (no store, or an unfinished one), or of another format.
    """
    marker = folder / MARKER
    if not marker.is_file():
        begun = (folder / SHARDS).is_dir()
        raise StoreError(
            "the store is not finished" if begun else "there is no store here",
            where=folder,
            fix="Run 'dist-train prepare' with the same settings to finish it, or 'dist-train "
            "finalize' if it is written in parts."
            if begun
            else "Make one with 'dist-train prepare', or check the path.",
        )
    try:
        content: dict[str, Any] = json.loads(marker.read_bytes())
        form = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"is not the marker of a store ({error})",
            where=marker,
            fix="Delete it and run 'dist-train finalize', which writes it anew.",
        ) from None
    if form != FORMAT:
        raise StoreError(
            f"the store has format '{form}', this version reads '{FORMAT}'",
            where=marker,
            fix="Prepare the store anew in another folder.",
        )
    return content
