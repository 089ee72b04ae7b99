"""MATLAB's files (.mat): v7.3 by h5py, older ones by SciPy; ``file.mat::name`` names the variable.

A variable has the axes of MATLAB's pictures: [height, width, depth]; in colour [height, width, 3],
and [height, width, 3, depth]; with other channels, [height, width, C, depth], only if these are
chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dist_train.data.raw.axes import stack_from_axes, while_open
from dist_train.data.raw.damage import check_packed
from dist_train.data.raw.formats.hdf5 import block_of, chosen_array, is_picture, opened_array
from dist_train.data.raw.stack import RGB, Choices, Stack
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".mat",)
PACKAGES = ("h5py",)
HAS_DATASETS = True

_NUMBERS = {"single", "double", "logical"}
_NUMBERS |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def read(path: Path, where: object, choices: Choices) -> Stack:
    with open_plain(path) as file:
        # v7.3 is HDF5, behind 512 bytes of its own.
        is_hdf5 = b"\x89HDF\r\n\x1a\n" in (file.read(8), file.seek(512) and file.read(8))
    return while_open(where, (_new if is_hdf5 else _old)(path, choices))


@contextmanager
def _new(path: Path, choices: Choices) -> Iterator[Stack]:
    with opened_array(path, choices.dataset) as array:
        # HDF5 has the axes in the order of C.
        axes, channels = _axes(array.shape[::-1], choices)
        kind = array.attrs.get("MATLAB_class", b"")
        if kind in (b"char", b"cell", b"struct"):
            raise DecodeError(f"has a {kind.decode()} in {array.name}, no array of numbers")
        yield stack_from_axes(
            array,
            axes[::-1],
            choices,
            np.dtype(bool) if kind == b"logical" else array.dtype,
            channels=channels,
            block=block_of(array, axes[::-1]),
        )


@contextmanager
def _old(path: Path, choices: Choices) -> Iterator[Stack]:
    from scipy.io import loadmat, whosmat

    with open_plain(path) as file:
        arrays = {
            name: SimpleNamespace(name=name, shape=shape)
            for name, shape, kind in whosmat(file)
            if kind in _NUMBERS and is_picture(shape, "f")
        }
        name = choices.dataset
        if name is not None and name not in arrays:
            raise DecodeError(f"has no array {name}", fix=f"It has: {', '.join(arrays)}.")
        chosen = arrays[name] if name else chosen_array(arrays)
        check_packed(math.prod(chosen.shape), path.stat().st_size)
        file.seek(0)
        # MATLAB stores whole numbers as integers, whatever the variable's type.
        array = loadmat(file, mat_dtype=True, variable_names=[chosen.name])[chosen.name]
    axes, channels = _axes(array.shape, choices)
    yield stack_from_axes(array, axes, choices, array.dtype, channels=channels)


def _axes(shape: tuple[int, ...], choices: Choices) -> tuple[str, tuple[str, ...] | None]:
    colour = RGB if shape[2:3] == (3,) else None
    if len(shape) == 2:
        return "YX", None
    if len(shape) == 3:
        return ("YXC", colour) if colour else ("YXZ", None)
    if len(shape) == 4 and (
        colour or shape[2] == 1 or choices.channels not in ("auto", "grey", "rgb")
    ):
        return "YXCZ", colour
    raise DecodeError(
        f"has shape {list(shape)}, not [height, width, depth]",
        fix="Choose --channels if the third of four axes is that of the channels."
        if len(shape) == 4
        else None,
    )
