"""A reader of a file format from outside the package, named by import path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import numpy as np

from dist_train.errors import ConfigError
from dist_train.extensions import load, origin

OPTION = "--reader"


@dataclass(frozen=True)
class OutsideReader:
    """What a store remembers of a reader; its pixels depend on the source.

    Attributes:
        path: import path of a function that takes the path of a file and gives uint8 or uint16
            [D, H, W]. Its attribute ``suffixes`` has the endings of its files, such as (".dcm",).
        suffixes: those, in lower case.
        version: of its package; None where it has none.
        sha256: over the Python files of its package.
    """

    path: str
    suffixes: tuple[str, ...]
    version: str | None
    sha256: str

    @classmethod
    def named(cls, path: str) -> OutsideReader:
        """The reader of an import path.

        Raises:
            ConfigError: it is not allowed, cannot be imported, or is no reader.
        """
        suffixes = getattr(_function(path), "suffixes", None)
        if not (
            isinstance(suffixes, tuple | list)
            and suffixes
            and all(isinstance(s, str) and s.startswith(".") for s in suffixes)
        ):
            raise ConfigError(
                f"{path} is no reader: it has no suffixes",
                where=OPTION,
                fix='Give the function an attribute such as suffixes = (".dcm",).',
            )
        facts = origin(path, OPTION)
        sha256 = facts["sha256"]
        assert sha256 is not None
        return cls(path, tuple(s.lower() for s in suffixes), facts["version"], sha256)

    def reads(self, name: str) -> bool:
        """Whether a file of this name is one of its own."""
        return name.lower().endswith(self.suffixes)

    def read(self, path: Path) -> np.ndarray:
        """What the function makes of a file, in a process that was given the reader: ``check`` was
        called in the one that gave it."""
        return np.asarray(load(self.path, OPTION, checked=True)(path))

    def check(self) -> None:
        """Raise ConfigError unless the user allows this process to import it."""
        _function(self.path)


def _function(path: str) -> Callable[[Path], np.ndarray]:
    found: Callable[[Path], np.ndarray] = load(path, OPTION)
    if not isinstance(found, FunctionType):
        raise ConfigError(
            f"{path} is no reader", where=OPTION, fix="Name a function of the path of a file."
        )
    return found
