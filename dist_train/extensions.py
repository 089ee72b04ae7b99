"""Models, losses and readers of file formats from outside the package, named by import path.

Importing a module runs its code, and the settings of a run may come from a stranger. So a module is
imported only if the user allowed its package: by ``--allow`` for this call, or for this machine by
the environment variable ``DIST_TRAIN_ALLOW``, a list separated by commas.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError

ALLOW = "DIST_TRAIN_ALLOW"


def allow(words: Sequence[str]) -> None:
    """Allow modules and everything below them, in this process and its children.

    Raises:
        ConfigError: a word is not the name of a module.
    """
    for word in words:
        if not _is_dotted_name(word):
            raise ConfigError(
                f"{word!r} is not the name of a module",
                where="--allow",
                fix="Give one such as mylab.",
            )
    os.environ[ALLOW] = ",".join([*_allowed(), *words])


def is_import_path(name: str) -> bool:
    """Whether a name is an import path, such as "mylab.nets:Net"."""
    return ":" in name


def load(path: str, where: object, *, checked: bool = False) -> Any:
    """The object of an import path, such as "mylab.nets:Net".

    Args:
        where: the setting or option that names it.
        checked: the parent process has loaded it, so the user has allowed it.

    Raises:
        ConfigError: the module is not allowed or cannot be imported, or the object comes from
            another module, which is not allowed.
    """
    module, _, name = path.partition(":")
    if not (_is_dotted_name(module) and name.isidentifier()):
        raise ConfigError(
            f"{path!r} is not an import path", where=where, fix="Write it as package.module:Name."
        )
    if not (checked or _is_allowed(module)):
        word = module.partition(".")[0]
        raise ConfigError(
            f"{path} is code from outside, which runs when it is imported",
            where=where,
            fix=f"If you trust it, add --allow {word}, or set {ALLOW}={word}.",
        )
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # the module's code may raise any
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{path} cannot be imported ({reason})",
            where=where,
            fix="Install it here, or put its folder into PYTHONPATH.",
        ) from None
    made_by = getattr(found, "__module__", None)
    if not (checked or (isinstance(made_by, str) and _is_allowed(made_by))):
        raise ConfigError(
            f"{path} comes from the module {made_by}, which is not allowed",
            where=where,
            fix="Name the module that defines it.",
        )
    return found


def origin(path: str, where: object) -> dict[str, str | None]:
    """Where the code of an import path comes from, as JSON types.

    Returns:
        ``path``; ``version`` of the package, or None; and ``sha256`` over all Python files of the
        package, as its modules use each other.

    Raises:
        ConfigError: as ``load``.
    """
    load(path, where)
    module = path.partition(":")[0]
    top = sys.modules[module.partition(".")[0]]
    file = Path(top.__file__ or sys.modules[module].__file__ or "")
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    digest = hashlib.sha256()
    for source in files:
        content = source.read_bytes() if source.is_file() else b""
        digest.update(f"{source.relative_to(file.parent)} {len(content)}\n".encode() + content)
    number: str | None = getattr(top, "__version__", None)
    with suppress(PackageNotFoundError):
        number = version(top.__name__)
    return {"path": path, "version": number, "sha256": digest.hexdigest()}


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _allowed() -> list[str]:
    return [word.strip() for word in os.environ.get(ALLOW, "").split(",") if word.strip()]


def _is_allowed(module: str) -> bool:
    return any(f"{module}.".startswith(f"{word}.") for word in _allowed())
