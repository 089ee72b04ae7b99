"""Atomic files (written aside, synced, renamed), safe reads, JSON, and CRC-32C.

Writing never follows a symbolic link. It only replaces plain files: regular ones, no devices or
FIFOs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import google_crc32c
import numpy as np

from dist_train.errors import DistTrainError, FileError
from dist_train.system.advice import blame_machine

PARTIAL = ".partial"
MIB = 1 << 20
# Largest JSON file, far above the sizes of this package's files.
MOST_JSON = 64 * MIB
# The name of an aside file: the final name, 16 hex digits, and the suffix.
_ASIDE = re.compile(rf"(?P<name>.+)\.[0-9a-f]{{16}}{re.escape(PARTIAL)}", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for binary writing, so that it appears complete and durable or not at all.

    The bytes go to a file with a random name in the same folder. It is fsynced and renamed when the
    block succeeds, and removed when it fails. A killed process leaves at most that file, which
    ``aside_for`` recognises. Concurrent writers of one path do not interfere; the last one wins. If
    ``path`` is a symbolic link to a plain file, the link is replaced, not its target.

    Raises:
        FileError: ``path`` exists and is not a plain file, such as a folder, device or FIFO.
        OSError: the disk is full, or cannot be written.
    """
    with _aside(path) as (file, _):
        yield file


@contextmanager
def whole_aside(path: Path) -> Iterator[Path]:
    """``written_whole`` for libraries that open files by name: yields the path of an empty file."""
    with _aside(path) as (_, aside):
        yield aside


@contextmanager
def _aside(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    check_replaceable(path)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with aside.open("xb") as file:
            yield file, aside
            file.flush()
            os.fsync(file.fileno())
        check_replaceable(path)
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # Unlike opening, writing (to a full disk, say) does not name the file.
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes | str) -> None:
    """``written_whole`` for content in memory; text is written as UTF-8."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def aside_for(path: Path) -> str | None:
    """The final name of a file that ``written_whole`` left behind.

    None if ``path`` has another form of name, or is not a plain file.
    """
    match = _ASIDE.fullmatch(path.name)
    return match["name"] if match and is_plain(path) else None


def is_plain(path: Path) -> bool:
    """Whether ``path`` is a plain file and not a symbolic link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def check_replaceable(path: Path) -> None:
    """Raise FileError unless ``path`` is missing, a plain file, or a link to one.

    Commands call it before their work, for files that they write at the end.
    """
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        raise FileError(
            f"is {_KINDS[stat.S_IFMT(mode)]}, and would be replaced by a file",
            where=path,
            fix="Move it away, or give another name.",
        )


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file, or a link to one, for binary reading. Never waits for a FIFO.

    Raises:
        FileError: ``path`` is not a plain file.
        OSError: ``path`` is missing, or cannot be opened.
    """
    return os.fdopen(plain_descriptor(path, os.O_RDONLY), "rb")


def reason_of(error: BaseException) -> str:
    """The message of an error, on one line, without the name of the file."""
    if isinstance(error, DistTrainError):
        return error.what
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def check_plain(path: Path, *, most_bytes: int) -> None:
    """Check a file before ``open``, which would wait for a FIFO.

    Raises:
        FileError: ``path`` is missing, not a plain file or a link to one, or too long.
        MachineError: the machine is at fault (see ``blame_machine``).
    """
    with _reading(path, most_bytes):
        pass


def read_plain(path: Path, *, most_bytes: int, but: Container[int] = ()) -> bytes:
    """The content of a plain file of at most ``most_bytes``.

    Args:
        but: see ``blame_machine``.

    Raises:
        FileError: the file is missing, not plain, too long, or cannot be read.
        MachineError: the machine is at fault (see ``blame_machine``).
    """
    with _reading(path, most_bytes, but) as file:
        return file.read()


@contextmanager
def _reading(path: Path, most_bytes: int, but: Container[int] = ()) -> Iterator[IO[bytes]]:
    try:
        with open_plain(path) as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise FileError(f"is longer than {most_bytes} bytes", where=path)
            yield file
    except OSError as error:
        blame_machine(error, path, but=but)
        raise FileError(f"cannot be read ({error.strerror})", where=path) from None


def read_json(path: Path, *, most_bytes: int = MOST_JSON) -> Any:
    """The content of a JSON file (UTF-8); see ``parse_json``.

    Raises:
        FileError: the file cannot be read, is longer than ``most_bytes``, or is not valid JSON.
    """
    try:
        return parse_json(read_plain(path, most_bytes=most_bytes))
    except ValueError as error:
        raise FileError(f"is not valid JSON ({error})", where=path) from None


def sealed(content: Mapping[str, Any]) -> str:
    """The canonical JSON text of an object, with its own CRC-32C in ``crc32c``."""
    return _text({**content, "crc32c": seal_of(content)})


def seal_of(content: Mapping[str, Any]) -> int:
    """The CRC-32C of an object without its ``crc32c``. The order of names does not matter."""
    return crc32c(_text(content).encode())


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether the ``crc32c`` of an object is that of its other content."""
    rest = {name: value for name, value in content.items() if name != "crc32c"}
    return bool(content.get("crc32c") == seal_of(rest))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True)


def parse_object(content: bytes | str) -> dict[str, Any]:
    """``parse_json`` of a JSON object.

    Raises:
        ValueError: the content is not a valid JSON object.
    """
    parsed = parse_json(content)
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def parse_json(content: bytes | str) -> Any:
    """Parse JSON. Duplicate names, infinite numbers, NaN and deep nesting are refused.

    Raises:
        ValueError: the content is not such JSON.
    """
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def open_lock(path: Path) -> IO[bytes]:
    """Open a lock file, which is created if missing. Its content is never changed.

    Raises:
        FileError: ``path`` is a link, or not a plain file.
    """
    return os.fdopen(plain_descriptor(path, os.O_RDWR | os.O_CREAT), "r+b")


def plain_descriptor(path: Path, flags: int) -> int:
    """``os.open`` for plain files, which never waits for a FIFO. For writing, links are refused.

    Raises:
        FileError: ``path`` is not a plain file.
        OSError: ``path`` cannot be opened.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    if writes and path.is_symlink():
        raise FileError("is a symbolic link, and is not written through", where=path)
    careful = os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if writes else 0)
    descriptor = os.open(path, flags | careful, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise FileError(f"is {_KINDS[stat.S_IFMT(mode)]}, not a plain file", where=path)
    return descriptor


def check_writable(folder: Path) -> None:
    """Create a folder and check that it can be written, before long work.

    Raises:
        OSError: it cannot be written; ``filename`` is the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, which on POSIX needs an fsync of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32c_of_file(path: Path) -> int:
    """CRC-32C of a plain file of any size.

    Raises:
        FileError: ``path`` is not a plain file.
        OSError: ``path`` is missing, or cannot be read.
    """
    # A memory map of a file that is truncated meanwhile would kill the process.
    crc, piece = 0, np.empty(MIB, np.uint8)
    with open_plain(path) as file:
        while size := file.readinto(piece.data):
            crc = google_crc32c.extend(crc, piece[:size])
    return crc


def crc32c(data: bytes | np.ndarray[Any, Any]) -> int:
    """CRC-32C (Castagnoli), unsigned, of bytes or of a C-contiguous array."""
    return int(google_crc32c.value(data))
