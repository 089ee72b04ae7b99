"""Where raw files come from.

What worker processes import, and so without the libraries of remote places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path


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

    @abstractmethod
    def changed_since(self, name: str, time: float) -> bool:
        """Whether the file is there and was put there, or changed, after a time (s since 1970)."""

    def narrowed(self, names: Sequence[str]) -> Source:
        """The same source for these files alone, to be sent to another process."""
        return self


@dataclass(frozen=True)
class LocalFolder(Source):
    """Files under a folder of this machine, used where they are."""

    folder: Path

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        yield self.folder / name

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (self.folder / name).is_file()]

    def changed_since(self, name: str, time: float) -> bool:
        try:
            # The time of the inode: a good copy that is moved or unpacked into place may well carry
            # an old modification time.
            return (self.folder / name).stat().st_ctime > time
        except FileNotFoundError:
            return False
