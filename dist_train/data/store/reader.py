"""A finished store: its clip table, and any clip by one ``pread``."""

from __future__ import annotations

import errno
import logging
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
)

from dist_train.data.store.clip_table import TABLE, ClipTable
from dist_train.data.store.index import check_index, digest_of, read_index
from dist_train.data.store.shards import REPAIR, shard_name
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

# Most shards that are kept open: a large store has more of them than a process may open files.
# Three quarters of the files that it may open are left to workers, connections, checkpoints.
OPEN_SHARDS = 256
SHARE_OF_OPEN_FILES = 4
# Clips from which opening a store without a clip table takes seconds.
MANY = 100_000
# Clips whose keys are in memory at a time.
PIECE = 1 << 16

log = logging.getLogger(__name__)


class Store:
    """Read access to a store.

    Workers may inherit it by a fork, as a ``pread`` moves no shared file position, or by pickling,
    as the copy opens its own files. Threads must not share it.

    Attributes:
        table: one row per clip, ordered by key. The position of a row is the number of the clip.
        info: the content of ``store.json``.

    Raises:
        StoreError: there is no store, or it is not finished, or its clip table is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = read_marker(folder)
        self.table = _open_table(folder, self.info)
        self._begin()

    def _begin(self) -> None:
        # Not checked, as the checksum of the pixels tells whether a clip's place is right.
        names = "shard", "offset", "crc32c"
        self._shard, self._offset, self._crc32c = map(self.table.unchecked, names)
        self._sizes = [self.table.unchecked(name) for name in ("frames", "height", "width")]
        # Shard number to file descriptor, least recently used first.
        self._descriptors: dict[int, int] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of what the store was made from: names, settings, decoder; not pixels."""
        return str(self.info["fingerprint"])

    @cached_property
    def content(self) -> str:
        """Identity of the content: SHA-256, in hex, over key, label and CRC-32C of each clip."""
        return str(self.info.get("content") or content_of(self.table))

    def read(self, clip: int) -> Volume:
        """Return the native crop of clip number ``clip``: uint8 [D, H, W], by one ``pread``.

        Raises:
            StoreError: there is no such clip, or its shard is missing or damaged.
            MachineError: too many files are open, or the disk fails.
        """
        self._check(clip)
        pixels = np.empty(self._shape(clip), dtype=np.uint8)
        self.read_into(pixels, clip)
        return pixels

    def read_into(self, out: Volume, clip: int) -> None:
        """Read a clip into ``out``: uint8, C order, as many pixels as the clip has."""
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
        """Return the number of the clip with this key."""
        found = self.table.clip_of(key)
        if found is None:
            raise StoreError(f"holds no clip '{key}'", where=self.folder)
        return found

    def _check(self, clip: int) -> None:
        # An array would take a negative number from its end.
        if not (isinstance(clip, int | np.integer) and 0 <= clip < len(self.table)):
            raise StoreError(
                f"holds no clip {clip}; they are 0 to {len(self.table) - 1}", where=self.folder
            )

    def _length(self, clip: int) -> int:
        return math.prod(self._shape(clip))

    def _shape(self, clip: int) -> tuple[int, int, int]:
        frames, height, width = (int(sizes[clip]) for sizes in self._sizes)
        return frames, height, width

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
                # This process has opened too many other files.
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
            f"clip '{self.table.text('key', clip)}' cannot be read ({what})",
            where=self._path(clip),
            fix=REPAIR,
        )

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "info": self.info, "table": self.table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()


def _open_table(folder: Path, info: dict[str, Any]) -> ClipTable:
    """The clip table; of a store without one, made of the index."""
    if "table_crc32c" in info:
        return ClipTable.open(folder / TABLE, info["table_crc32c"], info["clips"])
    if info["clips"] >= MANY and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s has no clip table, as an earlier version wrote it, so each process reads the whole "
            "index; 'dist-train finalize' writes the table",
            folder,
        )
    check_index(folder / INDEX, info["index_crc32c"])
    try:
        table = ClipTable.of(read_index(folder / INDEX), info["shards"])
        if len(table) != info["clips"]:
            raise ValueError(f"it holds {len(table)} clips, not {info['clips']}")
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise StoreError(
            f"the index is not that of the store ({error})",
            where=folder / INDEX,
            fix="Run 'dist-train verify' with --repair.",
        ) from None
    return table


def content_of(table: ClipTable) -> str:
    """Identity of a store's clips: see ``digest_of``."""
    pieces = (
        zip(
            table.texts("key", np.arange(first, min(first + PIECE, len(table)))),
            table["label"][first : first + PIECE].tolist(),
            table["crc32c"][first : first + PIECE].tolist(),
            strict=True,
        )
        for first in range(0, len(table), PIECE)
    )
    return digest_of(
        (key, {"label": label, "crc32c": crc}) for piece in pieces for key, label, crc in piece
    )


def read_marker(folder: Path) -> dict[str, Any]:
    """Read ``store.json``, which ``prepare`` writes last.

    Raises:
        StoreError: it is missing, as in an unfinished store, damaged, or of another format.
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
            raise _bad_marker(marker, "it has no format")
        if content["format"] != FORMAT:
            raise StoreError(
                f"the store has format '{content['format'][:99]}', this version reads '{FORMAT}'",
                where=marker,
                fix="Prepare the store anew in another folder.",
            )
        # Stores of earlier versions have neither.
        if ("content" in content or "crc32c" in content) and not is_sealed(content):
            raise _bad_marker(marker, "its checksum is wrong")
        content.pop("crc32c", None)
        _Marker.model_validate(content)
    except FileError as error:
        raise _bad_marker(marker, error.what) from None
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise _bad_marker(marker, f"its '{name}' is not valid") from None
    return content


def _bad_marker(path: Path, why: str) -> StoreError:
    return StoreError(
        f"is not the marker of a store ({why})",
        where=path,
        fix="Run 'dist-train finalize', which writes it anew from the shards.",
    )


class _Marker(BaseModel):
    """The entries of ``store.json``. A later version may add others."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: str
    fingerprint: Digest
    settings: dict[str, Any]
    clips: NonNegativeInt
    shards: NonNegativeInt
    rejected: dict[Literal["-1", "0", "1"], NonNegativeInt]
    index_crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]
    content: Digest | None = None
    table_crc32c: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
