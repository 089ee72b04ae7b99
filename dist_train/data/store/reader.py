"""A finished store: its clip table, and any clip by one ``pread``."""

from __future__ import annotations

import errno
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
)

from dist_train.data.store.index import check_index, digest_of, read_index
from dist_train.data.store.shards import shard_name
from dist_train.data.types import Volume
from dist_train.errors import FileError, StoreError
from dist_train.files import crc32c, is_sealed, plain_descriptor, read_json
from dist_train.system.advice import blame_machine, open_files

FORMAT = "dist_train store 1"
MARKER = "store.json"
INDEX = "index.lmdb"
SHARDS = "shards"
REJECTED = "rejected.csv"
MANIFEST = "manifest.csv"
MOST_MARKER = 1 << 20
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

# Shards that are kept open at once: a large store has more of them than a process may open files.
# Of those it leaves three quarters to others: workers, connections, checkpoints.
OPEN_SHARDS = 256
SHARE_OF_OPEN_FILES = 4

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
        check_index(folder / INDEX, self.info["index_crc32c"])
        rows = []
        try:
            for key, record in read_index(folder / INDEX):
                frames, height, width = record["shape"]
                rows.append(
                    {"key": key, "frames": frames, "height": height, "width": width}
                    | {name: record[name] for name in (*COLUMNS, "shard", "offset", "crc32c")}
                )
        except (KeyError, TypeError, ValueError) as error:
            raise _bad_index(folder, f"a record is not of this form ({error!r})") from None
        if len(rows) != self.info["clips"]:
            raise _bad_index(folder, f"it holds {len(rows)} clips, not {self.info['clips']}")
        try:
            self.table = _checked(pd.DataFrame(rows), self.info["shards"])
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise _bad_index(folder, str(error)) from None
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
        columns = (self.table[name] for name in ("key", "label", "crc32c"))
        return digest_of(
            (key, {"label": label, "crc32c": crc}) for key, label, crc in zip(*columns, strict=True)
        )

    def read(self, clip: int) -> Volume:
        """The native crop of clip number ``clip``: uint8 [D, H, W], one ``pread``.

        Raises:
            StoreError: there is no such clip, the shard is gone, or the bytes are not those that
                were written.
            MachineError: it cannot be read now, for too many open files or a failing disk.
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
            blame_machine(error, self._path(clip))
            raise self._damage(clip, error.strerror or str(error)) from None
        except FileError as error:
            raise self._damage(clip, error.what) from None
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
            if len(self._descriptors) >= min(OPEN_SHARDS, open_files() // SHARE_OF_OPEN_FILES):
                self._close_one()
            try:
                descriptor = plain_descriptor(self._path(clip), os.O_RDONLY)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._descriptors:
                    raise
                # Others of this process have more open than they were left.
                self._close_one()
                descriptor = plain_descriptor(self._path(clip), os.O_RDONLY)
        self._descriptors[shard] = descriptor
        return descriptor

    def _close_one(self) -> None:
        if self._descriptors:
            os.close(self._descriptors.pop(next(iter(self._descriptors))))

    def _path(self, clip: int) -> Path:
        return self.folder / SHARDS / shard_name(int(self._shard[clip]))

    def _damage(self, clip: int, what: str) -> StoreError:
        return StoreError(
            f"clip '{self.table['key'].iloc[clip]}' cannot be read ({what})",
            where=self._path(clip),
            fix="Run 'dist-train verify' with --repair, which rebuilds damaged shards.",
        )

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}


def _checked(table: pd.DataFrame, shards: int) -> pd.DataFrame:
    """The table with its types, if its values are of them.

    Raises:
        KeyError, ValueError, TypeError, OverflowError: they are not.
    """
    table = table.astype({"crowd_score": "float64", "weight": "float64"})
    least = {"frames": 1, "height": 1, "width": 1, "label": -1, "shard": 0, "offset": 0}
    most = {"label": 1, "shard": shards - 1, "crc32c": (1 << 32) - 1}
    for name in (*least, "crc32c"):
        column = table[name]
        fits = column.dtype == np.int64 and (column >= least.get(name, 0)).all()
        if not fits or (name in most and not (column <= most[name]).all()):
            raise ValueError(f"a clip has no valid '{name}'")
    if not np.isfinite(table["weight"]).all() or (table["weight"] < 0).any():
        raise ValueError("a clip has no valid 'weight'")
    if table["tier1"].dtype != np.bool_:
        raise ValueError("a clip has no valid 'tier1'")
    for name in ("key", "filename", "group", "split"):
        if not all(type(value) is str for value in table[name]):
            raise ValueError(f"a clip has no valid '{name}'")
    return table


def _bad_index(folder: Path, why: str) -> StoreError:
    return StoreError(
        f"the index is not that of the store ({why})",
        where=folder / INDEX,
        fix="Run 'dist-train verify' with --repair.",
    )


def read_marker(folder: Path) -> dict[str, Any]:
    """``store.json``, which ``prepare`` writes last.

    Raises:
        StoreError: it is missing (no store, or an unfinished one), or of another format.
    """
    marker = folder / MARKER
    if not os.path.lexists(marker):
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
        content = read_json(marker, most_bytes=MOST_MARKER)
        if not isinstance(content, dict) or not isinstance(content.get("format"), str):
            raise _no_marker(marker, "it has no format")
        if content["format"] != FORMAT:
            raise StoreError(
                f"the store has format '{content['format'][:99]}', this version reads '{FORMAT}'",
                where=marker,
                fix="Prepare the store anew in another folder.",
            )
        # Older ones have neither.
        if ("content" in content or "crc32c" in content) and not is_sealed(content):
            raise _no_marker(marker, "its checksum is wrong")
        content.pop("crc32c", None)
        _Marker.model_validate(content)
    except FileError as error:
        raise _no_marker(marker, error.what) from None
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise _no_marker(marker, f"its '{name}' is not of this form") from None
    return content


def _no_marker(path: Path, why: str) -> StoreError:
    return StoreError(
        f"is not the marker of a store ({why})",
        where=path,
        fix="Run 'dist-train finalize', which writes it anew from the shards.",
    )


class _Marker(BaseModel):
    """The entries of ``store.json``, without those that a later version may add."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: str
    fingerprint: Digest
    settings: dict[str, Any]
    clips: NonNegativeInt
    shards: NonNegativeInt
    rejected: dict[Literal["-1", "0", "1"], NonNegativeInt]
    index_crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]
    content: Digest | None = None
