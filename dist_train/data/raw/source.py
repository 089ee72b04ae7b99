"""Where raw files come from; without the libraries of remote places, for worker processes."""

from __future__ import annotations

import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from dist_train.data.raw.formats import reads_folder
from dist_train.errors import DecodeError
from dist_train.system.advice import blame_machine

MISSING = "the file is missing"
# The reasons of rejects that the next run tries again begin so.
UNFETCHED = "cannot be fetched"


def split_dataset(name: str) -> tuple[str, str]:
    """Return the file of a clip's name, and the array in it: FILE, or FILE::ARRAY."""
    file, _, dataset = name.partition("::")
    return file, "/".join(filter(None, dataset.split("/")))


class Source(ABC):
    """Raw files by their names in the manifest: FILE, or FILE::ARRAY for one of its arrays.

    It can be pickled; each process opens its own connection when it needs one.
    """

    @abstractmethod
    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """Give the path of a complete local copy of a clip's file, valid within the context.

        Raises:
            DecodeError: the file is missing, or may not be read.
            StoreError: no file can be fetched: the network or the server is down, or the
                credentials are wrong.
        """

    @abstractmethod
    def where(self, name: str) -> str:
        """The file's name in messages."""

    def missing(self, names: Sequence[str]) -> list[str]:
        """Files known to be missing. A network is not asked, which would take hours."""
        return []

    def twice(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Two names known to lead to one clip, None if there are none."""
        return None

    def hint(self, name: str) -> str | None:
        """Advice about a missing file, None if there is none."""
        return None

    @abstractmethod
    def changed_since(self, name: str, time: float) -> bool:
        """Whether the file exists and was changed or put there after ``time`` (s since 1970)."""

    def narrowed(self, names: Sequence[str]) -> Source:
        """The same source with these files alone, to be sent to another process."""
        return self


@dataclass(frozen=True)
class LocalFolder(Source):
    """Files, and folders that are one clip each, under a local folder; used in place.

    A name is also tried with slashes for backslashes, and in both Unicode forms: macOS and Windows
    write tables whose names are found nowhere else.
    """

    folder: Path

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        path = self.path(name)
        if path is None:
            raise DecodeError(MISSING, where=self.where(name), fix=self.hint(name))
        if path.is_dir():
            if not reads_folder(split_dataset(name)[0], path):
                raise DecodeError(
                    "is a folder, and none that is read as one clip",
                    where=self.where(name),
                    fix="Make one file of it: a multi-page TIFF, or an npy array [frames, height, "
                    "width].",
                )
        elif not path.is_file():
            raise DecodeError("is no plain file", where=self.where(name))
        yield path

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.path(name) is None]

    def twice(self, names: Sequence[str]) -> tuple[str, str] | None:
        seen: dict[tuple[int, int, str], str] = {}
        for name in names:
            # Links, '..' and file systems that ignore case give one file several names.
            path = self.path(name)
            file = path.stat() if path else None
            if file and (stat.S_ISREG(file.st_mode) or stat.S_ISDIR(file.st_mode)):
                clip = (file.st_dev, file.st_ino, split_dataset(name)[1])
                other = seen.setdefault(clip, name)
                if other != name:
                    return other, name
        return None

    def hint(self, name: str) -> str | None:
        parts = PurePosixPath(split_dataset(name)[0].replace("\\", "/")).parts
        # Names in the table may begin with the source folder.
        found = self._similar(parts) or self._similar(parts[-1:])
        if found is None:
            return None
        if not _exists(self.folder / found):
            return "It is a link that leads nowhere."
        return f"It exists as '{found}'."

    def _similar(self, parts: Sequence[str]) -> Path | None:
        """The file at a path that differs in case, Unicode form or suffix alone."""
        found = Path()
        for number, part in enumerate(parts, 1):
            names = _names_in(self.folder / found)
            name = names.get(_loose(part))
            if name is None and number == len(parts):
                name = names.get(_loose(Path(part).stem))
            if name is None:
                return None
            found /= name
        return found

    def changed_since(self, name: str, time: float) -> bool:
        path = self.path(name)
        if path is None:
            return False
        # A folder's own time is that of the last file that came or went.
        files = (path, *path.rglob("*")) if path.is_dir() else (path,)
        # The inode's time: a good copy that was moved here may have an old modification time.
        return any(file.stat().st_ctime > time for file in files)

    def path(self, name: str) -> Path | None:
        """The path of a clip's file, by any form of its name; None if it is missing."""
        name, _ = split_dataset(name)
        slashes = name.replace("\\", "/")
        composed, decomposed = (unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))
        forms = dict.fromkeys((name, composed, decomposed))
        return next((self.folder / form for form in forms if _exists(self.folder / form)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        # A folder without permission, or a failing disk, says nothing of the file.
        blame_machine(error, path)
        # The name is too long, for example.
        return False


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=16)
def _names_in(folder: Path) -> dict[str, str]:
    """Names in a folder by their loose form, with and without suffix."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return {}
    return {_loose(Path(name).stem): name for name in names} | {_loose(n): n for n in names}
