"""Files of a run, read with care: plain files only, of bounded size, and JSON of strict form."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

MIB = 2**20


def check_plain(path: Path, *, most: int | None = None) -> None:
    """Refuse what is no plain file, such as a pipe, whose reader would wait for ever.

    Args:
        most: size that the file may have, in bytes.

    Raises:
        OSError: it is missing, or no plain file, or larger; it names ``path``.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(facts.st_mode) else errno.EINVAL
        what = "Is a directory" if code == errno.EISDIR else "Is not a plain file"
        raise OSError(code, what, str(path))
    if most is not None and facts.st_size > most:
        raise OSError(errno.EFBIG, f"Is larger than {most // MIB} MiB", str(path))


def read_plain(path: Path, *, most: int) -> bytes:
    """The content of a plain file of at most ``most`` bytes.

    Raises:
        OSError: as ``check_plain``, or it cannot be read.
    """
    check_plain(path, most=most)
    # Without waiting, in case that a pipe took its place since.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"Is larger than {most // MIB} MiB", str(path))
    return content


def parse_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object. Names that are given twice, NaN and infinity are refused.

    Raises:
        ValueError: it is not one, or is nested too deeply.
    """
    try:
        parsed = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it gives a name twice")
    return content
