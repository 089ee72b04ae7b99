"""A finished store: its clip table, and any clip by one ``pread``, or from a server."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
)

from dist_train.config import CacheSettings
from dist_train.data.store.clip_cache import LEFT
from dist_train.data.store.clip_table import FIX, TABLE, ClipTable
from dist_train.data.store.index import check_index, digest_of, index_checksum, read_index
from dist_train.data.store.remote_store import UPLOAD, RemoteStore
from dist_train.data.store.shard_bytes import LocalShards, ShardBytes, Span
from dist_train.data.types import CLASS_CODE, DTYPES, GREY, LABEL, DtypeName, Volume, class_names
from dist_train.errors import FileError, MissingObjectError, StoreError
from dist_train.files import is_sealed, read_json
from dist_train.places import Location, is_url, local_path, shown
from dist_train.system.advice import blame_machine

FORMAT = "dist_train store 1"
MARKER = "store.json"
INDEX = "index.lmdb"
SHARDS = "shards"
REJECTED = "rejected.csv"
MANIFEST = "manifest.csv"
MOST_MARKER = 1 << 20
Name = Annotated[str, StringConstraints(min_length=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Names of the labels, where they are not the default ones.
ClassNames = dict[Annotated[str, StringConstraints(pattern=rf"^({CLASS_CODE})$")], str]

# Clips from which opening a store without a clip table takes seconds.
MANY = 100_000
# Share of a store's clips from which whole blocks are read: at most a third more bytes.
MOST = 3 / 4
# Clips whose keys are in memory at a time.
PIECE = 1 << 16

log = logging.getLogger(__name__)


class Store:
    """Read access to a store.

    Workers may inherit a local one by a fork, as a ``pread`` moves no shared file position, or any
    by pickling, as the copy opens its own files. Threads must not share it.

    Args:
        place: its folder or URL.
        cache: where to keep the parts of a remote store that were read.

    Attributes:
        place: its folder or URL.
        cache: the settings of the cache.
        name: the same for messages, without secrets.
        folder: where its files beside the shards are; for a remote store, in the cache.
        table: one row per clip, ordered by key. The position of a row is the number of the clip.
        info: the content of ``store.json``.
        channels: names of the channels of all clips.
        dtype: dtype of all clips: uint8, uint16 or float16.

    Raises:
        StoreError: there is no store, or it is not finished, or its clip table is damaged.
        RemoteError: the server of a remote store cannot be reached, or refuses.
        MachineError: the cache cannot be written.
    """

    def __init__(self, place: Location, cache: CacheSettings | None = None) -> None:
        self.place = place if is_url(place) else local_path(place)
        self.name = shown(str(self.place))
        self.cache = cache or CacheSettings()
        self._remote: RemoteStore | None = None
        self._bytes: ShardBytes
        if isinstance(self.place, str):
            remote = RemoteStore(self.place, self.cache, marker=MARKER, most_bytes=MOST_MARKER)
            self._remote = remote
            self.folder, self._bytes = remote.folder, remote.shards
            try:
                self.info = read_marker(self.folder)
            except StoreError as error:
                raise StoreError(error.what, where=f"{self.name}/{MARKER}", fix=error.fix) from None
        else:
            self.folder = self.place
            self._bytes = LocalShards(self.folder / SHARDS)
            self.info = read_marker(self.folder)
        self.channels: tuple[str, ...] = tuple(self.info.get("channels", GREY))
        self.dtype = DTYPES[self.info.get("dtype", "uint8")]
        self.table = self._open_table()
        self._begin()

    def _begin(self) -> None:
        # Not checked, as the checksum of the pixels tells whether a clip's place is right.
        names = "shard", "offset", "crc32c"
        self._shard, self._offset, self._crc32c = map(self.table.unchecked, names)
        self._sizes = [self.table.unchecked(name) for name in ("frames", "height", "width")]

    def _open_table(self) -> ClipTable:
        """The clip table; of a store without one, made of the index."""
        if "table_crc32c" not in self.info:
            return self._table_of_index(
                "no clip table, as an earlier version wrote it",
                "'dist-train finalize' writes the table",
            )
        if self._remote is None:
            return self._mapped_table(FIX)
        try:
            self._remote.bring(TABLE, self._is_table, self._is_whole_table)
        except MissingObjectError:
            return self._table_of_index(f"no clip table ('{TABLE}')", "upload it")
        return self._mapped_table("Delete it: it is downloaded again.")

    def _mapped_table(self, fix: str = FIX) -> ClipTable:
        info = self.info
        return ClipTable.open(self.folder / TABLE, info["table_crc32c"], info["clips"], fix)

    def _is_table(self) -> bool:
        """Whether the table's file has the right header and length."""
        try:
            self._mapped_table()
        except StoreError:
            return False
        return True

    def _is_whole_table(self) -> bool:
        """The same, of all bytes."""
        try:
            self._mapped_table().check()
        except StoreError:
            return False
        return True

    def _table_of_index(self, lacks: str, fix: str) -> ClipTable:
        if self.info["clips"] >= MANY and os.environ.get("RANK", "0") == "0":
            log.warning(
                "%s has %s, so each process reads the whole index; %s", self.name, lacks, fix
            )
        path, form = self.index(), (self.dtype, len(self.channels))
        try:
            classes = len(self.info.get("classes") or "01")
            table = ClipTable.of(read_index(path), self.info["shards"], form, classes)
            if len(table) != self.info["clips"]:
                raise ValueError(f"it holds {len(table)} clips, not {self.info['clips']}")
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise StoreError(
                f"the index is not that of the store ({error})",
                where=path if self._remote is None else f"{self.name}/{INDEX}",
                fix="Run 'dist-train verify' with --repair." if self._remote is None else UPLOAD,
            ) from None
        return table

    def index(self) -> Path:
        """The local path of the index, whose checksum is right.

        Raises:
            StoreError: it is missing or damaged.
            RemoteError: the server of a remote store does not give it.
        """
        path, checksum = self.folder / INDEX, self.info["index_crc32c"]
        if self._remote is None:
            check_index(path, checksum)
        else:
            self._remote.bring(INDEX, lambda: index_checksum(path) == checksum)
        return path

    @property
    def is_remote(self) -> bool:
        """Whether clips come from a server, unless they are in the cache."""
        return self._bytes.is_remote

    @property
    def fingerprint(self) -> str:
        """Identity of what the store was made from: names, settings, decoder; not pixels."""
        return str(self.info["fingerprint"])

    @property
    def classes(self) -> dict[int, str]:
        """Names of the labels: 0, 1, then further classes, and -1."""
        return class_names(self.info.get("classes"))

    @cached_property
    def content(self) -> str:
        """Identity of the content: SHA-256, in hex, over key, label and CRC-32C of each clip."""
        return str(self.info.get("content") or content_of(self.table))

    def read(self, clip: int) -> Volume:
        """Return the native crop of clip number ``clip``, by one ``pread``: of ``dtype`` and
        ``shape``.

        Raises:
            StoreError: there is no such clip, or its shard is missing or damaged.
            MachineError: too many files are open, or the disk fails.
            RemoteError: the server of a remote store does not give it.
        """
        self._check(clip)
        pixels = np.empty(self.shape(clip), self.dtype)
        self.read_into(pixels, clip)
        return pixels

    def read_into(self, out: Volume, clip: int) -> None:
        """Read a clip into ``out``: of ``dtype``, C order, as many values as the clip has."""
        self._check(clip)
        length = math.prod(self.shape(clip))
        if out.dtype != self.dtype or not out.flags.c_contiguous or out.size != length:
            raise StoreError(
                f"clip {clip} is not to be read into {out.dtype} {list(out.shape)}: it has "
                f"{length} pixels, {self.dtype} in C order",
                where=self.folder,
            )
        try:
            is_right = self._bytes.read_into(out, self._span(clip))
        except OSError as error:
            blame_machine(error, self.where(clip))
            raise self._damage(clip, error.strerror or str(error)) from None
        except FileError as error:
            raise self._damage(clip, error.what) from None
        if not is_right:
            raise self._damage(clip, "the bytes are not those that were stored")

    def file(self, name: str) -> Path:
        """The local path of a file beside the shards, which may be missing."""
        if self._remote is not None:
            self._remote.bring_optional(name)
        return self.folder / name

    def prefetch(self, clips: Iterable[int]) -> None:
        """Start reading clips that are soon asked for, if the store is remote."""
        if self.is_remote:
            self._bytes.prefetch([self._span(clip) for clip in clips])

    def expect(self, clips: int) -> None:
        """Say how many clips a pass reads. If these are most of a remote store, and the cache can
        hold it, it is read by whole blocks from now on, in copies of this object, too.
        """
        if self._remote is None or clips < MOST * len(self.table):
            return
        values = np.einsum("i,i,i->", *self._sizes, dtype=np.int64)
        length = int(values) * len(self.channels) * self.dtype.itemsize
        self._remote.shards.by_blocks = length <= LEFT * self.cache.size

    def where(self, clip: int) -> Location:
        """The shard of a clip, for messages."""
        return self._bytes.where(int(self._shard[clip]))

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

    def shape(self, clip: int) -> tuple[int, ...]:
        """[D, H, W], or [D, H, W, C] with several channels."""
        frames, height, width = (int(sizes[clip]) for sizes in self._sizes)
        channels = len(self.channels)
        return (frames, height, width, *([channels] if channels > 1 else ()))

    def _span(self, clip: int) -> Span:
        shard, offset, checksum = self._shard[clip], self._offset[clip], self._crc32c[clip]
        length = math.prod(self.shape(clip)) * self.dtype.itemsize
        return Span(int(shard), int(offset), length, int(checksum))

    def _damage(self, clip: int, what: str) -> StoreError:
        return StoreError(
            f"clip '{self.table.text('key', clip)}' cannot be read ({what})",
            where=self.where(clip),
            fix=self._bytes.repair,
        )

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("_shard", "_offset", "_crc32c", "_sizes")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()


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
    rejected: dict[Annotated[str, StringConstraints(pattern=rf"^({LABEL})$")], NonNegativeInt]
    index_crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]
    content: Digest | None = None
    channels: Annotated[list[Name], Field(min_length=1)] = list(GREY)
    dtype: DtypeName = "uint8"
    classes: ClassNames | None = None
    table_crc32c: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
