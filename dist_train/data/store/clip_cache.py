"""A bounded folder with the parts of remote stores that were read, for all processes of a machine.

    DIR/.used          its length counts the bytes of the folder, in units of ``UNIT``
    DIR/.lock          held by the process that makes room
    DIR/<store>/       32 hex digits of the SHA-256 of ``store.json``
        .open          locked by each process that has the store open
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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

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
OPEN = ".open"


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
        self._open: int | None = None
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
            self._hold()
            # Reading leaves no trace, so a store counts as used when it is opened.
            for path in self._own.rglob("*"):
                with suppress(OSError):
                    os.utime(path)
            # Whether there is room is found out, and told, again.
            (self._own / NO_ROOM).unlink(missing_ok=True)
        return self._own

    def _hold(self) -> None:
        """Let the files beside the shards stay as long as this object lives."""
        assert self._own is not None
        self._open = plain_descriptor(self._own / OPEN, os.O_RDWR | os.O_CREAT)
        with suppress(OSError):
            fcntl.flock(self._open, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if self.__dict__.get("_open") is not None:
            os.close(self.__dict__["_open"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._own is not None:
            # The process that sent it has the store open, too.
            with suppress(OSError, FileError):
                self._hold()

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

        After all shards of a store its other files are removed, unless a process has it open.
        """
        with ExitStack() as opened:
            lock = opened.enter_context(open_lock(self.folder / ".lock"))
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
                    if path.is_file() and not path.name.startswith("."):
                        files.append((found.st_mtime, found.st_blocks * 512, path))
            used = sum(size for _, size, _ in files)
            if used > self.size:
                is_open = {self._own: True}
                for size, path in self._in_order(files):
                    if used <= LEFT * self.size:
                        break
                    store = self._store_of(path)
                    if path.suffix != ".tar":
                        if store not in is_open:
                            is_open[store] = _is_open(store, opened)
                        if is_open[store]:
                            continue
                    if _gave_way(path):
                        used -= size
            with suppress(OSError):
                (self.folder / ".used").touch(0o600)
                os.truncate(self.folder / ".used", used // UNIT)

    def _in_order(self, files: Iterable[tuple[float, int, Path]]) -> list[tuple[int, Path]]:
        """Sizes and paths in the order in which they give way: by when they were used, and all
        shards of a store before its other files."""
        used: dict[Path, float] = {}
        for when, size, path in files:
            store = self._store_of(path)
            # Cutting a shard is no use of it.
            used[store] = max(used.get(store, 0), when if size else 0)
        ordered = sorted(
            (when, False, size, path) if path.suffix == ".tar"
            else (used[self._store_of(path)], True, size, path)
            for when, size, path in files
        )  # fmt: skip
        return [(size, path) for _, _, size, path in ordered]

    def _store_of(self, path: Path) -> Path:
        return self.folder / path.relative_to(self.folder).parts[0]

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


def _is_open(store: Path, opened: ExitStack) -> bool:
    """Whether a process has the store open. If not, who opens it waits until ``opened`` ends."""
    try:
        file = opened.enter_context(open_lock(store / OPEN))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileError):
        return True
    except OSError:
        # Without locks nobody knows.
        pass
    return False


def _gave_way(path: Path) -> bool:
    with suppress(OSError):
        if path.suffix == ".tar":
            # Not removed: others have it open, and would go on writing to what nobody counts.
            os.truncate(path, 0)
        else:
            path.unlink()
        return True
    return False
