"""A store that is written behind a URL, shard by shard.

Workers write shards in a folder of this machine, and upload each when it is finished. The folder
keeps a sparse file in its place, which has all but the pixels. So the index is made as that of a
local store, and the disk holds no more than the shards in work. A shard counts as written once its
list of rejects is here, which comes after the upload.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from tarfile import BLOCKSIZE
from typing import IO

from dist_train.data.store.build_spec import JOB
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.reader import INDEX, MANIFEST, MARKER, REJECTED, SHARDS
from dist_train.data.store.shards import (
    SHARD_FILE,
    Shard,
    is_end,
    member,
    padded,
    read_records,
    read_sample,
)
from dist_train.errors import StoreError
from dist_train.files import whole_aside
from dist_train.objects import IN_FLIGHT, Objects
from dist_train.places import Location, is_url, local_path, user_cache

# Bytes that are read after the pixels of a clip: its record, and the header of the next clip.
_BETWEEN = 1 << 13


def folder_of(out: Location) -> Path:
    """The folder in which the store at ``out`` is made: for a URL in the user's cache."""
    if not is_url(out):
        return local_path(out)
    name = hashlib.sha256(str(out).rstrip("/").encode()).hexdigest()[:32]
    return user_cache() / "written" / name


def publisher_of(out: Location) -> Publisher | None:
    """Open the URL of a store, and bring what is there; None for a folder.

    Raises:
        RemoteError, StoreError: see ``Publisher.adopt``.
    """
    if not is_url(out):
        return None
    publisher = Publisher(str(out), folder_of(out))
    publisher.adopt()
    return publisher


class Publisher:
    """Uploads what is written in ``folder`` to ``url``. Copies may be sent to other processes."""

    def __init__(self, url: str, folder: Path) -> None:
        self._objects, self._folder = Objects(url), folder

    def adopt(self) -> None:
        """Bring what another machine, or an earlier run, has uploaded already.

        Raises:
            RemoteError: the server cannot be reached, or refuses.
            StoreError: the web cannot be written to, or a shard there is damaged.
        """
        names = self._objects.names("")
        if names is None:
            raise StoreError(
                "the web cannot be written to",
                where=self._objects.where(""),
                fix="Give --out as a folder, s3://, gs:// or az://.",
            )
        (self._folder / SHARDS).mkdir(parents=True, exist_ok=True)
        for name in (JOB, MANIFEST):
            if name in names and not (self._folder / name).exists():
                self._bring(name)
        paths = [PurePosixPath(name) for name in names]
        there = {path.name for path in paths if path.parent.name == SHARDS}
        there = {name for name in there if SHARD_FILE.fullmatch(name)}
        shards = [
            Shard(int(name[6:-4]), self._folder / SHARDS) for name in there if name.endswith(".tar")
        ]
        missing = [s for s in shards if s.rejects_path.name in there and not s.is_written()]
        with ThreadPoolExecutor(IN_FLIGHT) as threads:
            list(threads.map(self._bring_shard, missing))

    def begin(self) -> None:
        """Upload what the store is made from, so that it is refused to other settings."""
        for name in (JOB, MANIFEST):
            self._objects.put(name, self._folder / name)

    def drop_marker(self) -> None:
        """Make the store count as unfinished."""
        self._objects.remove(MARKER)

    def put_shard(self, shard: Shard, rejects: str) -> None:
        """Upload a shard that was written whole, and free its pixels here."""
        name = f"{SHARDS}/{shard.path.name}"
        self._objects.put(name, shard.path)
        self._objects.put(f"{SHARDS}/{shard.rejects_path.name}", rejects.encode())
        hollow(shard.path)

    def finish(self, names: Sequence[str] = (REJECTED, INDEX, TABLE)) -> None:
        """Upload the lists of a finished store, and its marker last."""
        for name in (*names, MARKER):
            self._objects.put(name, self._folder / name)

    def _bring(self, name: str) -> None:
        with whole_aside(self._folder / name) as aside:
            self._objects.download(name, aside)

    def _bring_shard(self, shard: Shard) -> None:
        """Bring a shard without its pixels, and then its list of rejects."""
        name = f"{SHARDS}/{shard.path.name}"
        size = self._objects.size(name)
        with whole_aside(shard.path) as aside, aside.open("r+b", buffering=0) as file:
            file.truncate(size)
            here = range(0)

            def need(start: int, end: int) -> None:
                nonlocal here
                if start not in here or end > here.stop:
                    here = range(start, min(max(end, start + _BETWEEN), size))
                    part = self._objects.read(name, here.start, here.stop)
                    os.pwrite(file.fileno(), self._objects.start(part).result(), start)

            at: int | None = 0
            while at is not None:
                need(at, at + BLOCKSIZE)
                at = self._bring_sample(file, at, size, need)
        self._bring(f"{SHARDS}/{shard.rejects_path.name}")

    def _bring_sample(
        self, file: IO[bytes], at: int, size: int, need: Callable[[int, int], None]
    ) -> int | None:
        """Bring all of a sample but its pixels; return where the next one begins."""
        if is_end(file, at):
            return None
        _, begin, length = member(file, at, size)
        # Between the header and the pixels is the header of the array.
        need(at, min(begin + BLOCKSIZE, begin + length))
        after = padded(begin + length)
        need(after, after + BLOCKSIZE)
        _, begin, length = member(file, after, size)
        need(after, begin + length)
        sample = read_sample(file, at, size)
        assert sample is not None
        return sample[2]


def hollow(path: Path) -> None:
    """Replace a shard by a sparse file that has all but the pixels of its clips."""
    places = [(record["offset"], record["length"]) for _, record in read_records(path)]
    size = path.stat().st_size
    with path.open("rb") as shard, whole_aside(path) as aside, aside.open("r+b") as file:
        file.truncate(size)
        at = 0
        for offset, length in [*places, (size, 0)]:
            shard.seek(at)
            file.seek(at)
            file.write(shard.read(offset - at))
            at = offset + length
