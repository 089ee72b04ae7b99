"""Where raw files come from.

What worker processes import, and so without the libraries of remote places.
"""

from __future__ import annotations

import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from dist_train.errors import DecodeError
from dist_train.system.advice import blame_machine

MISSING = "the file is missing"
# How the reason of a reject begins that another run may well not have: it is tried again.
UNFETCHED = "cannot be fetched"


class Source(ABC):
    """Raw files by their names in the manifest.

    It can be pickled; a connection is opened by the process that uses it, when it does.
    """

    @abstractmethod
    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A complete local copy of a file, which lasts as long as the context.

        Raises:
            DecodeError: this one file is not there, or may not be read.
            StoreError: nothing can be had: the network or the server is down, or the credentials
                are wrong.
        """

    @abstractmethod
    def where(self, name: str) -> str:
        """How messages name the file."""

    @abstractmethod
    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the files that are known not to be there."""

    def twice(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Two of the names that are known to lead to one file, if there are such."""
        return None

    def hint(self, name: str) -> str | None:
        """Under which name a missing file is there after all, if that is known."""
        return None

    @abstractmethod
    def changed_since(self, name: str, time: float) -> bool:
        """Whether the file is there and was put there, or changed, after a time (s since 1970)."""

    def narrowed(self, names: Sequence[str]) -> Source:
        """The same source for these files alone, to be sent to another process."""
        return self


@dataclass(frozen=True)
class LocalFolder(Source):
    """Files under a folder of this machine, used where they are.

    A name is also found with its backslashes turned to slashes, and in Unicode's other form: macOS
    and Windows write tables whose names lead nowhere elsewhere.
    """

    folder: Path

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        if path is None:
            raise DecodeError(MISSING, where=self.where(name), fix=self.hint(name))
        if path.is_dir():
            raise DecodeError(
                "is a folder, not a file",
                where=self.where(name),
                fix="Make one file of it: a multi-page TIFF, or an npy array [frames, height, "
                "width].",
            )
        if not path.is_file():
            raise DecodeError("is no plain file", where=self.where(name))
        yield path

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._path(name) is None]

    def twice(self, names: Sequence[str]) -> tuple[str, str] | None:
        seen: dict[tuple[int, int], str] = {}
        for name in names:
            path = self._path(name)
            if path is None:
                continue
            # One file may have several names: by links, by '..', or where case does not count.
            file = path.stat()
            if stat.S_ISREG(file.st_mode):
                other = seen.setdefault((file.st_dev, file.st_ino), name)
                if other != name:
                    return other, name
        return None

    def hint(self, name: str) -> str | None:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        # The folder that is the source may also be in the table's names.
        found = self._nearly(parts) or self._nearly(parts[-1:])
        if found is None:
            return None
        if not _exists(self.folder / found):
            return "It is a link that leads nowhere."
        return f"It exists as '{found}'."

    def _nearly(self, parts: Sequence[str]) -> Path | None:
        """The one file whose path is these, but for case, Unicode's form and suffix."""
        found = Path()
        for number, part in enumerate(parts, 1):
            there = _names_in(self.folder / found)
            name = there.get(_loose(part))
            if name is None and number == len(parts):
                name = there.get(_loose(Path(part).stem))
            if name is None:
                return None
            found /= name
        return found

    def changed_since(self, name: str, time: float) -> bool:
        path = self._path(name)
        # The time of the inode: a good copy that is moved or unpacked into place may well carry
        # an old modification time.
        return path is not None and path.stat().st_ctime > time

    def _path(self, name: str) -> Path | None:
        """Where the file, or whatever has this name, is."""
        slashes = name.replace("\\", "/")
        forms = (name, unicodedata.normalize("NFC", slashes), unicodedata.normalize("NFD", slashes))
        paths = (self.folder / form for form in dict.fromkeys(forms))
        return next((path for path in paths if _exists(path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        # A folder that may not be entered, or a disk that fails, says nothing of the file.
        blame_machine(error, path)
        # As of a name that is too long.
        return False


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=16)
def _names_in(folder: Path) -> dict[str, str]:
    """Names in a folder by what is left of them without case, and without case and suffix."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return {}
    return {_loose(Path(name).stem): name for name in names} | {_loose(n): n for n in names}
