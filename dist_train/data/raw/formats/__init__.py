"""File formats: each module reads one, or several of one library.

A module has

- ``SUFFIXES``: endings of its files, in lower case, such as (".nd2",);
- ``PACKAGES``: the packages that it imports when it reads, by the names that pip knows;
- ``read(path, where, choices)``: path of a file -> ``Stack``; it raises DecodeError, or anything
  on damaged bytes;
- if its files hold arrays by name, as ``FILE::ARRAY``: ``HAS_DATASETS = True``;
- if its clips may be folders: ``reads_folder(path)``, whether it reads this one.

Its heavy imports are inside ``read``, so that the list of formats is cheap. A new module in this
folder is found by itself.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from pkgutil import iter_modules
from typing import Protocol, cast

from dist_train.data.raw.stack import Choices, Stack
from dist_train.errors import ConfigError


class Format(Protocol):
    """The interface of the modules in this folder."""

    SUFFIXES: tuple[str, ...]
    PACKAGES: tuple[str, ...]

    def read(self, path: Path, where: object, choices: Choices) -> Stack: ...


@cache
def formats() -> tuple[Format, ...]:
    """All modules of this folder, by name."""
    names = sorted(module.name for module in iter_modules(__path__))
    return tuple(cast(Format, import_module(f"{__name__}.{name}")) for name in names)


def suffixes() -> tuple[str, ...]:
    return tuple(suffix for each in formats() for suffix in each.SUFFIXES)


def may_be_folder(name: str) -> bool:
    """Whether a clip of this name may be a folder: without a suffix, with that of a format of
    folders, or with a number at its end, such as 1.2.840.10008."""
    ends = [end for each in formats() if hasattr(each, "reads_folder") for end in each.SUFFIXES]
    suffix = PurePosixPath(name).suffix
    return not suffix or suffix[1:].isdecimal() or name.lower().endswith(tuple(ends))


def format_of(name: str, path: Path) -> Format | None:
    """Return the format of a clip by its file's name, or what a folder holds; None if unknown.

    Raises:
        ConfigError: a package is missing that the format needs.
    """
    by_suffix = [
        (len(suffix), number)
        for number, each in enumerate(formats())
        for suffix in each.SUFFIXES
        if name.lower().endswith(suffix)
    ]
    found: Format | None = None
    if by_suffix:
        # The longest: ".nii.gz" is no ".gz".
        found = formats()[max(by_suffix)[1]]
    elif path.is_dir():
        folders = (each for each in formats() if hasattr(each, "reads_folder"))
        found = next((each for each in folders if each.reads_folder(path)), None)
    if found is not None:
        for package in found.PACKAGES:
            if not _is_installed(package):
                raise ConfigError(
                    f"files such as {name} need the package {package}, which is not installed",
                    fix="Install dist_train[formats], or leave these files out of the table.",
                )
    return found


@cache
def _is_installed(package: str) -> bool:
    """Whether a package is there. To find its version takes 1 ms, for each clip."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def reads_folder(name: str, path: Path) -> bool:
    """Whether a folder is one clip of the format that its name and content tell.

    Raises:
        ConfigError: see ``format_of``.
    """
    found = format_of(name, path)
    if found is None or not hasattr(found, "reads_folder"):
        return False
    return bool(found.reads_folder(path))
