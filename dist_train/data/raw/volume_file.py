"""Volumes in TIFF and NumPy's files, or in memory -> uint8 [D, H, W]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.raw.axes import axes_of_plain, stack_from_axes
from dist_train.data.raw.damage import reading
from dist_train.data.raw.formats import npy
from dist_train.data.raw.grey import to_8_bits
from dist_train.data.raw.stack import Choices
from dist_train.data.raw.tiff import read_tiff, tiff_values
from dist_train.data.types import Volume
from dist_train.errors import DecodeError
from dist_train.files import open_plain

_TIFF_SUFFIXES = {".tif", ".tiff"}
VOLUME_SUFFIXES = {".npy", ".npz"} | _TIFF_SUFFIXES


def read_raw(path: Path, where: object, suffix: str | None = None) -> np.ndarray:
    """Return the stack in a TIFF, npy, or npz file of one array, with the values of the file.

    Returns:
        [D, H, W], or [D, H, W, 3 or 4] in colour.

    Raises:
        DecodeError: the file cannot be read.
    """
    suffix = (path.suffix if suffix is None else suffix).lower()
    try:
        if suffix not in _TIFF_SUFFIXES:
            return np.stack(list(npy.read(path, where, Choices()).frames))
        with reading(where), open_plain(path) as file:
            return read_tiff(file, where)
    except MemoryError:
        raise too_large(where) from None


def values_of(path: Path, suffix: str) -> tuple[np.dtype[Any] | None, int | None]:
    """Return the type of a file's values by its header, and their depth by its metadata.

    Raises what the parsers raise on damaged bytes.
    """
    if suffix not in _TIFF_SUFFIXES:
        return npy.npy_dtype(path), None
    with open_plain(path) as file:
        return tiff_values(file)


def to_uint8_volume(array: np.ndarray, where: object, bits: int | None = None) -> Volume:
    """Bring an array without metadata to uint8 [D, H, W].

    Its axes are those of ``axes_of_plain``.

    Raises:
        DecodeError: see ``to_grey``.
    """
    try:
        axes, channels = axes_of_plain(array.shape, Choices())
        stack = stack_from_axes(array, axes, Choices(), array.dtype, channels=channels)
        return to_grey(np.stack(list(stack.frames)), bits)
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
