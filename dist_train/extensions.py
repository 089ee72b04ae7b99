"""Models, losses and readers of file formats from outside the package, named by import path.

Importing a module runs its code, and the settings of a run may come from a stranger. So a module is
imported only if the user named its package: by ``--allow`` in this call, or on this machine by the
environment variable ``DIST_TRAIN_ALLOW``, words separated by commas.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError

ALLOW = "DIST_TRAIN_ALLOW"


def allow(words: Sequence[str]) -> None:
    """Allow modules, with all that is below them, in this process and those that it starts.

    Raises:
        ConfigError: a word is no name of a module.
    """
    for word in words:
        if not _is_dotted_name(word):
            raise ConfigError(
                f"{word!r} is no name of a module", where="--allow", fix="Give one such as mylab."
            )
    os.environ[ALLOW] = ",".join([*_allowed(), *words])


def is_import_path(name: str) -> bool:
    """Whether a name is of something outside of the package, as "mylab.nets:Net" is."""
    return ":" in name


def load(path: str, where: object, *, checked: bool = False) -> Any:
    """What an import path, such as "mylab.nets:Net", names.

    Args:
        where: the setting or option that names it.
        checked: the process that started this one has loaded it, so the user allowed it there.

    Raises:
        ConfigError: the user has not allowed the module, or it cannot be imported, or what it names
            was made by a module that is not allowed.
    """
    module, _, name = path.partition(":")
    if not (_is_dotted_name(module) and name.isidentifier()):
        raise ConfigError(
            f"{path!r} is no import path", where=where, fix="Write it as package.module:Name."
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
    except Exception as error:  # whatever the module's own code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{path} cannot be imported ({reason})",
            where=where,
            fix="Install it here, or put its folder into PYTHONPATH.",
        ) from None
    made_by = getattr(found, "__module__", None)
    if not (checked or (isinstance(made_by, str) and _is_allowed(made_by))):
        raise ConfigError(
            f"{path} is of the module {made_by}, which is not allowed",
            where=where,
            fix="Name the module that defines it.",
        )
    return found


def origin(path: str, where: object) -> dict[str, str | None]:
    """Where what an import path names comes from, as JSON types: ``path``, ``version`` of the
    package, None where it has none, and ``sha256`` over all Python files of the package, as one
    module computes by the others.

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
    try:
        number: str | None = version(top.__name__)
    except PackageNotFoundError:
        number = str(getattr(top, "__version__", "")) or None
    return {"path": path, "version": number, "sha256": digest.hexdigest()}


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _allowed() -> list[str]:
    return [word.strip() for word in os.environ.get(ALLOW, "").split(",") if word.strip()]


def _is_allowed(module: str) -> bool:
    return any(f"{module}.".startswith(f"{word}.") for word in _allowed())
