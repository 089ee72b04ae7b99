"""A store behind a URL: its lists come down once, its clips as they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from dist_train.config import CacheSettings
from dist_train.data.store.clip_cache import ClipCache
from dist_train.data.store.remote_shards import RemoteShards
from dist_train.errors import MissingObjectError, StoreError
from dist_train.files import is_plain, whole_aside, write_whole
from dist_train.objects import Objects

UPLOAD = "Upload the store's files again, and 'store.json' last."


class RemoteStore:
    """The store's folder in the cache, and its files.

    Args:
        marker: name of the file that is written last.

    Attributes:
        folder: holds the marker, and the files that were brought.

    Raises:
        StoreError: there is no finished store.
        RemoteError: the server cannot be reached, or refuses.
        MachineError: the cache cannot be written.
    """

    def __init__(self, url: str, settings: CacheSettings, *, marker: str, most_bytes: int) -> None:
        self._objects = Objects(url)
        try:
            content = self._objects.get(marker, most_bytes=most_bytes)
        except MissingObjectError:
            raise StoreError(
                f"there is no store here, or it is not finished ('{marker}' is missing)",
                where=self._objects.where(""),
                fix="Check the URL. Upload the store's files, and this one last.",
            ) from None
        self._cache = ClipCache(settings)
        # What the marker says decides over all bytes, wherever the store lies.
        self.folder = self._cache.of_store(hashlib.sha256(content).hexdigest()[:32])
        with self._cache.locked():
            if not is_plain(self.folder / marker):
                write_whole(self.folder / marker, content)
        self.shards = RemoteShards(self._objects, self._cache, self.folder / "shards")

    def bring(
        self,
        name: str,
        is_right: Callable[[], bool],
        has_come_right: Callable[[], bool] | None = None,
    ) -> None:
        """Download a file to the folder if it is not there, or not right.

        Args:
            has_come_right: checks what was downloaded; the default is ``is_right``.

        Raises:
            MissingObjectError: it is neither here nor there.
            StoreError: the one that comes is wrong, twice.
        """
        path = self.folder / name
        with self._cache.locked():
            if is_plain(path) and is_right():
                os.utime(path)
                return
            for _ in range(2):
                self._download(name, path)
                if (has_come_right or is_right)():
                    return
        raise StoreError(
            "the file is not that of the store: its checksum is wrong",
            where=self._objects.where(name),
            fix=UPLOAD,
        )

    def bring_optional(self, name: str) -> None:
        """Download a file that a reader may do without, if it is there."""
        path = self.folder / name
        with self._cache.locked():
            if not is_plain(path):
                try:
                    self._download(name, path)
                except MissingObjectError:
                    return

    def _download(self, name: str, path: Path) -> None:
        with whole_aside(path) as aside:
            self._objects.download(name, aside)
