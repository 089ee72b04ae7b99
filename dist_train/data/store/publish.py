"""A store that is written behind a URL, shard by shard.

Workers write shards in a folder of this machine, and upload each when it is finished. The folder
keeps a sparse file in its place, which has all but the pixels. So the index is made as that of a
local store, and the disk holds no more than the shards in work. A shard counts as written once its
list of rejects is here, which comes after the upload.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tarfile import BLOCKSIZE, TarError
from typing import IO

from dist_train.data.store.build_spec import JOB, MOST_JOB
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.reader import INDEX, MANIFEST, MARKER, REJECTED, SHARDS
from dist_train.data.store.rejects import MOST_REJECTS
from dist_train.data.store.shards import (
    REPAIR,
    Shard,
    is_end,
    member,
    padded,
    read_records,
    read_sample,
)
from dist_train.data.store.write_lock import LOCK
from dist_train.errors import MissingObjectError, StoreError
from dist_train.files import reason_of, whole_aside
from dist_train.objects import IN_FLIGHT, Objects
from dist_train.places import Location, is_url, local_path, user_cache

# Bytes that are read after the pixels of a clip: its record, and the header of the next clip.
_BETWEEN = 1 << 13
REWRITE = "Remove the damaged shard and its list there, and run the command again."


def folder_of(out: Location) -> Path:
    """The folder in which the store at ``out`` is made: for a URL in the user's cache."""
    if not is_url(out):
        return local_path(out)
    name = hashlib.sha256(str(out).rstrip("/").encode()).hexdigest()[:32]
    return user_cache() / "written" / name


def publisher_of(out: Location) -> Publisher | None:
    """Open the URL of a store, and bring what is there; None for a folder.

    Raises:
        RemoteError, StoreError: see ``Publisher.adopt_job``.
    """
    if not is_url(out):
        return None
    publisher = Publisher(str(out), folder_of(out))
    publisher.adopt_job()
    return publisher


class Publisher:
    """Uploads what is written in ``folder`` to ``url``. Copies may be sent to other processes."""

    def __init__(self, url: str, folder: Path) -> None:
        self._objects, self._folder = Objects(url), folder

    def adopt_job(self) -> None:
        """Bring what the store there is made from. The server decides: what is left here of another
        store is removed.

        Raises:
            RemoteError: the server cannot be reached, or refuses.
            StoreError: the web cannot be written to.
        """
        names = self._names()
        there = self._objects.get(JOB, most_bytes=MOST_JOB) if JOB in names else None
        job = self._folder / JOB
        if (job.read_bytes() if job.exists() else None) != there:
            self._clear()
        (self._folder / SHARDS).mkdir(parents=True, exist_ok=True)
        for name in (JOB, MANIFEST):
            if name in names:
                self._bring(name)

    def _clear(self) -> None:
        """Empty the folder here, which only this class fills, but for locks."""
        for path in self._folder.glob("*"):
            if path.name == SHARDS:
                shutil.rmtree(path)
            elif not path.name.startswith(LOCK):
                path.unlink()

    def adopt(self, shards: Sequence[Shard]) -> None:
        """Make these shards here what they are behind the URL, by whichever machine. Call it with
        the lock on them.

        Raises:
            RemoteError: the server cannot be reached, or refuses.
            StoreError: a shard there is damaged.
        """
        names = set(self._names())

        def one(shard: Shard) -> None:
            own = self._of(shard.path), self._of(shard.rejects_path)
            if not names.issuperset(own):
                if shard.is_written():
                    shard.rejects_path.unlink()
                    shard.path.unlink()
                return
            # A shard is rewritten when a file that it rejected was mended.
            there = self._objects.get(own[1], most_bytes=MOST_REJECTS)
            if not shard.is_written() or shard.rejects_path.read_bytes() != there:
                self._bring_shard(shard)

        with ThreadPoolExecutor(IN_FLIGHT) as threads:
            list(threads.map(one, shards))

    def put_rejects(self) -> None:
        """Upload the list of rejects of a store that is not finished."""
        if (self._folder / REJECTED).is_file():
            self._objects.put(REJECTED, self._folder / REJECTED)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let errors about files of the folder name their URLs."""
        try:
            yield
        except StoreError as error:
            place = error.where
            if not isinstance(place, Path) or not place.is_relative_to(self._folder):
                raise
            name = "" if place == self._folder else str(place.relative_to(self._folder))
            fix = REWRITE if error.fix == REPAIR else error.fix
            raise StoreError(error.what, where=self._objects.where(name), fix=fix) from None

    def fill(self, shard: Shard) -> None:
        """Bring the pixels of a shard, too, if it is there."""
        with suppress(MissingObjectError):
            self._bring(self._of(shard.path))

    def _names(self) -> list[str]:
        names = self._objects.names("")
        if names is None:
            raise StoreError(
                "the web cannot be written to",
                where=self._objects.where(""),
                fix="Give --out as a folder, s3://, gs:// or az://.",
            )
        return names

    @staticmethod
    def _of(path: Path) -> str:
        return f"{SHARDS}/{path.name}"

    def begin(self) -> None:
        """Upload what the store is made from, so that it is refused to other settings."""
        for name in (JOB, MANIFEST):
            self._objects.put(name, self._folder / name)

    def drop_marker(self) -> None:
        """Make the store count as unfinished."""
        self._objects.remove(MARKER)

    def put_shard(self, shard: Shard, rejects: str) -> None:
        """Upload a shard that was written whole, and free its pixels here."""
        # Without a list a shard counts as not written.
        self._objects.remove(self._of(shard.rejects_path))
        self._objects.put(self._of(shard.path), shard.path)
        self._objects.put(self._of(shard.rejects_path), rejects.encode())
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
        shard.rejects_path.unlink(missing_ok=True)
        try:
            self._bring_hollow(shard)
        except (TarError, ValueError) as error:
            raise StoreError(
                f"is not a readable shard ({reason_of(error)})",
                where=self._objects.where(self._of(shard.path)),
                fix=REWRITE,
            ) from None
        self._bring(self._of(shard.rejects_path))

    def _bring_hollow(self, shard: Shard) -> None:
        name = self._of(shard.path)
        size, written = self._objects.head(name)
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
        # Files that were mended since then are read again.
        os.utime(shard.path, (written, written))

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
        return None if sample is None else sample[2]


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
