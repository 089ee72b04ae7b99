"""Files that are whole or not there: written aside, synced, then renamed; and their checksum.

Nothing here follows a symbolic link in order to write, and nothing but a plain file is replaced.
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
# Bounds of what is read as JSON: no file of this program comes near them.
MOST_JSON = 64 * MIB
MOST_DEPTH = 64
# Bytes that are read at a time for a checksum.
PIECE = 1 << 20
# Of an aside file: the name it will have, 16 hex digits, and the suffix.
_ASIDE = re.compile(rf"(?P<name>.+)\.[0-9a-f]{{16}}{re.escape(PARTIAL)}", re.DOTALL)
# A FIFO without a writer would else be waited for, before it can be seen to be one.
_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for binary writing so that it appears complete, durable, or not at all.

    The bytes go to a file of a random name beside it, which is fsynced and renamed when the block
    ends well and removed when it does not; a killed process leaves at most that file, whose name
    ``aside_for`` knows. Processes that write the same path at once do not meet; the last counts.
    Where ``path`` is a symbolic link to a plain file, the link is replaced and its target is left
    as it is.

    Raises:
        FileError: ``path`` is there and is no plain file: a folder, a device, a FIFO.
        OSError: the disk is full, or cannot be written.
    """
    with _aside(path) as (file, _):
        yield file


@contextmanager
def whole_aside(path: Path) -> Iterator[Path]:
    """As ``written_whole``, for libraries that write by a name: gives that of an empty file."""
    with _aside(path) as (_, aside):
        yield aside


@contextmanager
def _aside(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    check_replaceable(path)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with new_file(aside) as file:
            yield file, aside
            file.flush()
            os.fsync(file.fileno())
        check_replaceable(path)
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # As of a full disk: writing, other than opening, names no file.
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes | str) -> None:
    """``written_whole`` for content that is at hand; text is written as UTF-8."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def aside_for(path: Path) -> str | None:
    """The name of the file that ``path`` was to become, if ``written_whole`` made ``path``.

    None where the name is not of that form, or belongs to no plain file.
    """
    match = _ASIDE.fullmatch(path.name)
    return match["name"] if match and is_plain(path) else None


def is_plain(path: Path) -> bool:
    """Whether a plain file is there, itself and not by a symbolic link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def check_replaceable(path: Path) -> None:
    """Raise FileError unless a plain file, or a link to one, or nothing at all is there.

    Commands call it for what they will write at their end, before they begin to work.
    """
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        raise FileError(
            f"is {_kind(mode)}, and would be replaced by a file",
            where=path,
            fix="Move it away, or give another name.",
        )


def new_file(path: Path) -> IO[bytes]:
    """Open a file that is not there yet for binary writing.

    Raises:
        FileExistsError: something of that name is there, be it a link.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFULLY, 0o666)
    return os.fdopen(descriptor, "wb")


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file, or a link to one, for binary reading; a FIFO is not waited for.

    Raises:
        FileError: it is something else.
        OSError: it is not there, or cannot be opened.
    """
    return os.fdopen(plain_descriptor(path, os.O_RDONLY), "rb")


def reason_of(error: BaseException) -> str:
    """What an error says, on one line, without the name of the file."""
    if isinstance(error, DistTrainError):
        return error.what
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def check_plain(path: Path, *, most_bytes: int | None = None) -> None:
    """Raise FileError unless a plain file, or a link to one, is there, and not longer: for what a
    library opens by its name, and would wait for where it is a FIFO."""
    try:
        found = path.stat()
    except OSError as error:
        blame_machine(error, path)
        raise FileError(f"cannot be read ({error.strerror})", where=path) from None
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"is {_kind(found.st_mode)}, not a plain file", where=path)
    if most_bytes is not None and found.st_size > most_bytes:
        raise FileError(f"is longer than {most_bytes} bytes", where=path)


def read_plain(path: Path, *, most_bytes: int, but: Container[int] = ()) -> bytes:
    """The content of a plain file of at most so many bytes.

    Args:
        but: as of ``blame_machine``.

    Raises:
        FileError: it is missing, something else, longer, or cannot be read.
        MachineError: it cannot be read, and the file is not to blame.
    """
    try:
        with open_plain(path) as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise FileError(f"is longer than {most_bytes} bytes", where=path)
            return file.read()
    except OSError as error:
        blame_machine(error, path, but=but)
        raise FileError(f"cannot be read ({error.strerror})", where=path) from None


def read_json(path: Path, *, most_bytes: int = MOST_JSON) -> Any:
    """The content of a JSON file (UTF-8); see ``parse_json``.

    Raises:
        FileError: it cannot be read, is longer than ``most_bytes``, or is no such JSON.
    """
    try:
        return parse_json(read_plain(path, most_bytes=most_bytes))
    except ValueError as error:
        raise FileError(f"is not valid JSON ({error})", where=path) from None


def sealed(content: Mapping[str, Any]) -> str:
    """The JSON text of an object with its own CRC-32C as ``crc32c``; one text for one content."""
    return _text({**content, "crc32c": seal_of(content)})


def seal_of(content: Mapping[str, Any]) -> int:
    """The CRC-32C that an object has as its own ``crc32c``, whatever the order of its names."""
    return crc32c(_text(content).encode())


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether an object that was read has the ``crc32c`` of ``seal_of``."""
    rest = {name: value for name, value in content.items() if name != "crc32c"}
    return bool(content.get("crc32c") == seal_of(rest))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True)


def parse_object(content: bytes | str) -> dict[str, Any]:
    """``parse_json`` of a JSON object.

    Raises:
        ValueError: it is none.
    """
    parsed = parse_json(content)
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def parse_json(content: bytes | str) -> Any:
    """JSON in which no object has a name twice, all numbers are finite, and depth is bounded.

    Raises:
        ValueError: it is not.
    """
    try:
        value = json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is too deep") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("it is too deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def open_lock(path: Path) -> IO[bytes]:
    """Open a lock file, which is made if it is not there, and never changed.

    Raises:
        FileError: a link, or anything else than a plain file, has its name.
    """
    return os.fdopen(plain_descriptor(path, os.O_RDWR | os.O_CREAT), "r+b")


def plain_descriptor(path: Path, flags: int) -> int:
    """``os.open`` for plain files alone; a symbolic link is refused where ``flags`` allow writing.

    Raises:
        FileError: it is something else.
        OSError: it cannot be opened.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    if writes and path.is_symlink():
        raise FileError("is a symbolic link, and is not written through", where=path)
    careful = _CAREFULLY if writes else _CAREFULLY & ~os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | careful, 0o666)
    except OSError:
        _check_plain(path)
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise FileError(f"is {_kind(mode)}, not a plain file", where=path)
    return descriptor


def _check_plain(path: Path) -> None:
    """Say what cannot be opened for what it is: a socket, a device without a driver."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise FileError(f"is {_kind(mode)}, not a plain file", where=path) from None


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no plain file")


def check_writable(folder: Path) -> None:
    """Make the folder, and a nameless file in it that is gone at once: for work that takes long and
    is written at its end.

    Raises:
        OSError: naming the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (POSIX: the directory itself must be fsynced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32c_of_file(path: Path) -> int:
    """CRC-32C of a plain file of any size, read piece by piece: a memory map of a file that becomes
    shorter would end the process.

    Raises:
        FileError: it is no plain file.
        OSError: it is missing, or cannot be read.
    """
    crc, piece = 0, np.empty(PIECE, np.uint8)
    with open_plain(path) as file:
        while size := file.readinto(piece.data):
            crc = google_crc32c.extend(crc, piece[:size])
    return crc


def crc32c(data: bytes | np.ndarray[Any, Any]) -> int:
    """Checksum of bytes, or of a C-contiguous array's bytes: CRC-32C (Castagnoli), unsigned."""
    return int(google_crc32c.value(data))
