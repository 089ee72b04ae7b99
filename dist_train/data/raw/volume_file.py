"""Volumes -> uint8 [D, H, W]; files of arrays (npy, npz) without pickle."""

from __future__ import annotations

import errno
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dist_train.data.raw.grey import to_8_bits
from dist_train.data.types import Volume
from dist_train.errors import DecodeError, DistTrainError
from dist_train.files import open_plain, reason_of
from dist_train.system.advice import blame_machine

VOLUME_SUFFIXES = {".npy", ".npz"}

# Errors of the machine that a single file may cause.
OF_A_FILE = {errno.EACCES, errno.EPERM, errno.ENOMEM}


def read_raw(path: Path, where: object) -> np.ndarray:
    """Return the stack in an npy file, or an npz file of one array, with the values of the file.

    Returns:
        [D, H, W], or [D, H, W, 3 or 4] in colour.

    Raises:
        DecodeError: the file cannot be read.
    """
    try:
        with open_plain(path) as file, _npy_inside(file) as (member, size):
            return _as_stack(read_npy(member, size))
    except DistTrainError:
        raise
    except MemoryError:
        raise too_large(where) from None
    # On damaged bytes the parsers raise anything: struct, zlib, zipfile, index and type errors.
    except Exception as error:
        blame_machine(error, where, but=OF_A_FILE)
        raise DecodeError(f"cannot be read ({reason_of(error)})", where=where) from None


def values_of(path: Path) -> np.dtype[Any]:
    """Return the type of a file's values by its header.

    Raises what the parsers raise on damaged bytes.
    """
    with open_plain(path) as file, _npy_inside(file) as (member, _):
        return _npy_header(member)[1]


def to_uint8_volume(array: np.ndarray, where: object, bits: int | None = None) -> Volume:
    """Bring an array without metadata to uint8 [D, H, W].

    A last axis of 3 or 4 is colour in a single picture and in more than three axes; a last axis of
    1 after three others is dropped. A picture is a volume of depth 1.

    Raises:
        DecodeError: see ``to_grey``.
    """
    try:
        return to_grey(_as_stack(array), bits)
    except DecodeError as error:
        raise DecodeError(error.what, where=where, fix=error.fix) from None


def to_grey(array: np.ndarray, bits: int | None) -> Volume:
    """Bring a stack, [D, H, W] or [D, H, W, 3 or 4] in colour, to uint8 [D, H, W].

    uint8 is kept; uint16 keeps the 8 highest of ``bits`` bits; bool becomes 0 and 255; RGB becomes
    BT.601 luma.

    Raises:
        DecodeError: the array has another dtype or shape, or is uint16 and ``bits`` is None or too
            few.
    """
    if is_deep(array.dtype):
        array = to_8_bits(array, bits)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype != np.uint8:
        raise DecodeError(f"holds {array.dtype} values", fix="Use uint8, uint16 or bool.")
    if array.ndim == 4 and array.shape[-1] in (3, 4):
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
        array = np.rint(array[..., :3] @ weights).astype(np.uint8)
    if array.ndim != 3 or 0 in array.shape:
        raise DecodeError(f"has shape {list(array.shape)}, not [depth, height, width]")
    return np.ascontiguousarray(array)


def is_deep(dtype: np.dtype[Any] | None) -> bool:
    """Whether values of this type keep any depth in 16 bits."""
    return dtype is not None and dtype.newbyteorder("=") == np.uint16


def too_large(where: object) -> DecodeError:
    """The error for a file whose decoding ran out of memory."""
    return DecodeError(
        "takes more memory to decode than it may",
        where=where,
        fix="Cut it into shorter clips, or prepare anew with a larger --clip-memory.",
    )


def read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """Read the one array in a file of NumPy's format (NEP 1).

    Memory is taken only after the header was compared with ``size``.

    Args:
        file: at its start, and able to go back there.
        size: number of bytes in ``file``.
    """
    shape, dtype = _npy_header(file)
    declared, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    # A second np.save to the same file would leave more.
    if declared != held and not dtype.hasobject:
        raise ValueError(f"declares {declared} bytes of values, holds {held}")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _as_stack(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4)):
        array = array[None]
    return array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array


@contextmanager
def _npy_inside(file: IO[bytes]) -> Iterator[tuple[IO[bytes], int]]:
    """Give an npy file, or the only one in an npz archive, and its size in bytes."""
    is_zip = file.read(2) == b"PK"
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not is_zip:
        yield file, size
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) != 1:
            raise ValueError(f"holds {len(members)} arrays, one is needed")
        with archive.open(members[0]) as member:
            yield member, members[0].file_size


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        # Only structured arrays with field names beyond Latin-1 need a later one.
        raise ValueError(f"version {version[0]}.{version[1]} of the npy format")
    return shape, dtype
