"""A bounded folder with the parts of remote stores that were read, for all processes of a machine.

    DIR/.used          its length counts the bytes of the folder, in units of ``UNIT``
    DIR/.lock          held by the process that makes room
    DIR/<store>/       32 hex digits of the SHA-256 of ``store.json``
        store.json, index.lmdb, ...
        shards/*.tar   sparse: only the clips that were read are in it, at their own offsets

Nothing says which clips are there: a clip is, if its bytes have the checksum that the index gives.
So a process may be killed at any point, several may write the same clip, and room is made by
cutting a shard to nothing while others read it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_train.config import CacheSettings
from dist_train.errors import FileError, MachineError
from dist_train.files import open_lock, plain_descriptor, reason_of
from dist_train.places import user_cache
from dist_train.system.advice import advice

log = logging.getLogger(__name__)

UNIT = 1 << 16
#: Share of the allowed size that is left when room was made.
LEFT = 7 / 8
# Bytes of a write. For longer ones the kernel looks for pages of megabytes, which can take ten
# times as long.
CHUNK = 1 << 18
NO_ROOM = ".no-room"


class ClipCache:
    """The folder of ``settings``, made if it is missing.

    Copies may be sent to other processes.

    Raises:
        MachineError: it cannot be written.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.folder = (settings.dir or user_cache() / "stores").absolute()
        self.size = int(settings.size)
        self._own: Path | None = None
        self.is_full = False
        with self._blamed():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.folder / ".used").exists():
                self._make_room()

    def of_store(self, name: str) -> Path:
        """The folder of one store, which is used from now on."""
        self._own = self.folder / name
        with self._blamed():
            if not self._own.is_dir():
                if os.environ.get("RANK", "0") == "0":
                    log.warning(
                        "parts of the store are kept in %s, at most %.3g GiB (cache.dir, "
                        "cache.size)",
                        self.folder, self.size / 2**30,
                    )  # fmt: skip
                (self._own / "shards").mkdir(parents=True, exist_ok=True)
            # Reading leaves no trace, so a store counts as used when it is opened.
            for path in self._own.rglob("*"):
                with suppress(OSError):
                    os.utime(path)
            # Whether there is room is found out, and told, again.
            (self._own / NO_ROOM).unlink(missing_ok=True)
        return self._own

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the files beside the shards. Without locks, all write them."""
        assert self._own is not None
        with self._blamed(), open_lock(self._own / ".lock") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def write(self, path: Path, offset: int, content: memoryview) -> bool:
        """Write a part of a shard, and return whether it was possible."""
        if self.is_full:
            return False
        try:
            descriptor = plain_descriptor(path, os.O_WRONLY | os.O_CREAT)
            try:
                for at in range(0, len(content), CHUNK):
                    part = content[at : at + CHUNK]
                    if os.pwrite(descriptor, part, offset + at) < len(part):
                        # A second call would say why.
                        raise OSError(0, "not all could be written")
            finally:
                os.close(descriptor)
            self._count(len(content))
        except (OSError, FileError) as error:
            self.is_full = True
            self._tell_once(error)
            return False
        return True

    def _tell_once(self, error: Exception) -> None:
        """Warn, in the first process of a run that meets the error."""
        assert self._own is not None
        try:
            os.close(os.open(self._own / NO_ROOM, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return
        except OSError:
            pass
        log.warning("%s: clips are read without being kept (%s)", self.folder, reason_of(error))

    def _count(self, written: int) -> None:
        used = self.folder / ".used"
        # Appending needs no lock.
        descriptor = os.open(used, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, bytes(-(-written // UNIT)))
            units = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if units * UNIT > self.size:
            self._make_room()

    def _make_room(self) -> None:
        """Cut the shards that were used least recently, unless another process does so.

        Other files of other stores are removed as well. Those of this one remain.
        """
        with open_lock(self.folder / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                # Without locks two may make room, and too much.
                pass
            files = []
            for path in self.folder.glob("*/**/*"):
                with suppress(OSError):
                    found = path.lstat()
                    if path.is_file():
                        files.append((found.st_mtime, found.st_blocks * 512, path))
            used = sum(size for _, size, _ in files)
            if used > self.size:
                for _, size, path in sorted(files):
                    if used <= LEFT * self.size:
                        break
                    if self._gave_way(path):
                        used -= size
            with suppress(OSError):
                (self.folder / ".used").touch(0o600)
                os.truncate(self.folder / ".used", used // UNIT)

    def _gave_way(self, path: Path) -> bool:
        with suppress(OSError):
            if path.suffix == ".tar":
                # Not removed: others have it open, and would go on writing to what nobody counts.
                os.truncate(path, 0)
                return True
            if path.parent != self._own and not path.name.startswith("."):
                path.unlink()
                return True
        return False

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except (OSError, FileError) as error:
            raise MachineError(
                f"the cache of remote stores cannot be used ({reason_of(error)})",
                where=self.folder,
                fix=f"Choose another folder by cache.dir. {advice(error) or ''}".rstrip(),
            ) from None
