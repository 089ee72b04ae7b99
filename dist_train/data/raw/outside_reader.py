"""A reader of a file format from outside the package, named by import path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import FunctionType

import numpy as np

from dist_train.data.raw.axes import plain_stack
from dist_train.data.raw.stack import Choices, Stack
from dist_train.errors import ConfigError, DecodeError
from dist_train.extensions import load, origin

OPTION = "--reader"


@dataclass(frozen=True)
class OutsideReader:
    """A reader as the store records it.

    Attributes:
        path: import path of a function: path of a file -> ``Stack``, or an array (see
            ``plain_stack``). If it has a parameter ``choices``, it is given a ``Choices``. Its
            attribute ``suffixes`` has the suffixes of its files, such as (".dcm",).
        suffixes: the same, in lower case.
        version: of the reader's package, None without one.
        sha256: of the Python files of the reader's package.
    """

    path: str
    suffixes: tuple[str, ...]
    version: str | None
    sha256: str

    @classmethod
    def named(cls, path: str) -> OutsideReader:
        """Return the reader at an import path.

        Raises:
            ConfigError: the reader is not allowed, cannot be imported, or is no reader.
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
        source = origin(path, OPTION)
        return cls(
            path, tuple(s.lower() for s in suffixes), source["version"], str(source["sha256"])
        )

    def reads(self, name: str) -> bool:
        """Whether the name has one of the reader's suffixes."""
        return name.lower().endswith(self.suffixes)

    def read(self, path: Path, choices: Choices) -> Stack:
        """Read a file, in a process whose parent called ``check``.

        Raises:
            ConfigError, DecodeError: there are choices that the function does not take.
        """
        function = load(self.path, OPTION, checked=True)
        if "choices" in signature(function).parameters:
            found = function(path, choices=choices)
        else:
            self._refuse(choices)
            found = function(path)
        return found if isinstance(found, Stack) else plain_stack(np.asarray(found), choices)

    def _refuse(self, choices: Choices) -> None:
        """Refuse what only the function could choose. Channels are chosen of what it gives."""
        instead = "give the function a parameter 'choices' (docs/extending.md)."
        if choices.dataset is not None:
            raise DecodeError(
                f"the reader {self.path} takes no '::{choices.dataset}'",
                fix=f"Give the file's name alone, or {instead}",
            )
        for name in ("depth_axis", "plane", "series"):
            if getattr(choices, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"the reader {self.path} takes no {option}",
                    where=OPTION,
                    fix=f"Leave {option} out, or {instead}",
                )

    def check(self) -> None:
        """Raise ConfigError unless the user allows this process to import the reader."""
        _function(self.path)


def _function(path: str) -> Callable[[Path], object]:
    found: Callable[[Path], object] = load(path, OPTION)
    if not isinstance(found, FunctionType):
        raise ConfigError(
            f"{path} is no reader", where=OPTION, fix="Name a function of the path of a file."
        )
    return found
