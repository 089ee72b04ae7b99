"""NumPy's npy files (NEP 1), and npz archives of one array, without pickle."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dist_train.data.raw.axes import axes_of_plain, stack_from_axes
from dist_train.data.raw.damage import reading
from dist_train.data.raw.stack import Choices, Stack
from dist_train.files import open_plain

SUFFIXES = (".npy", ".npz")
PACKAGES = ()


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Read an array; ``axes_of_plain`` says what its axes are."""
    with reading(where), open_plain(path) as file, _npy_inside(file) as (member, size):
        array = read_npy(member, size)
    axes, channels = axes_of_plain(array.shape, choices)
    return stack_from_axes(array, axes, choices, array.dtype, channels=channels)


def read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """Read the one array in a file of NumPy's format.

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


def npy_dtype(path: Path) -> np.dtype[Any]:
    """Return the type of a file's values by its header. Raises anything on damaged bytes."""
    with open_plain(path) as file, _npy_inside(file) as (member, _):
        return _npy_header(member)[1]


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
