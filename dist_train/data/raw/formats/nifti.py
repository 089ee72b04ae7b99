"""NIfTI-1 and NIfTI-2 files in one part (.nii, .nii.gz), by nibabel.

The frames are the planes of the third axis (k), their rows the second (j), their columns the first
(i), as stored: nothing is turned to the axes of the patient. The fourth axis is time, and the fifth
holds channels.
"""

from __future__ import annotations

import gzip
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from dist_train.data.raw.axes import stack_from_axes, while_open
from dist_train.data.raw.damage import check_held, check_packed
from dist_train.data.raw.stack import ALPHA, RGB, Choices, Stack
from dist_train.data.raw.units import MICROMETRES
from dist_train.errors import DecodeError
from dist_train.files import open_plain

# Known so that a message can say what to do.
_PAIRS = (".hdr", ".img", ".img.gz")
SUFFIXES = (".nii", ".nii.gz", *_PAIRS)
PACKAGES = ("nibabel",)

_AXES = "XYZTCUV"
# xyzt_units of nifti1.h: lengths in its three lowest bits, times in the next three.
_LENGTHS = {1: MICROMETRES["m"], 2: MICROMETRES["mm"], 3: MICROMETRES["um"]}
_TIMES = {8: 1.0, 16: 1e-3, 24: 1e-6}
# Data types of three and four bytes a voxel.
_COLOURS = {128: RGB, 2304: (*RGB, ALPHA)}


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Read a volume; its values are scaled by the header's slope and intercept."""
    if str(where).lower().endswith(_PAIRS):
        raise DecodeError("is one of a pair of files", fix="Save both as one file .nii.")
    return while_open(where, _opened(path, choices))


@contextmanager
def _opened(path: Path, choices: Choices) -> Iterator[Stack]:
    from nibabel.arrayproxy import ArrayProxy

    with open_plain(path) as plain:
        is_packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file = cast(IO[bytes], gzip.GzipFile(fileobj=plain) if is_packed else plain)
        header, size = _header(file), path.stat().st_size
        shape = tuple(int(length) for length in header.get_data_shape())
        colours = _COLOURS.get(int(header["datatype"]))
        if min(shape, default=0) < 1 or len(shape) < 2:
            raise DecodeError(f"has shape {list(shape)}, which is no volume")
        axes = _AXES[: len(shape)]
        if colours is None:
            stored = header.get_data_dtype()
            # None for a slope of 0, which means none.
            slope, intercept = header.get_slope_inter()
        else:
            stored, slope, intercept = np.dtype(np.uint8), None, None
            axes, shape = f"C{axes}", (len(colours), *shape)
            if len(shape) > 5:
                raise DecodeError("has channels of colours")
        scaling = (1.0 if slope is None else slope, intercept or 0.0)
        declared, offset = math.prod(shape) * stored.itemsize, int(header.get_data_offset())
        if is_packed:
            check_packed(declared, size)
        else:
            check_held(declared, size - offset)
        low, high = float(header["cal_min"]), float(header["cal_max"])
        stack = stack_from_axes(
            ArrayProxy(file, (shape, stored, offset, *scaling), mmap=False),
            axes,
            choices,
            # float32 for 16 bits: their scaled values have no more.
            stored if scaling == (1.0, 0.0) else np.result_type(stored, np.float32),
            channels=colours,
            spacing=_spacing(header),
            interval=_interval(header),
            window=(low, high) if low < high else None,
            block=_block(axes, shape) if is_packed else 1,
        )
        yield replace(stack, frames=_to_the_end(stack, file))


def _block(axes: str, shape: tuple[int, ...]) -> int:
    """Number of packed frames that are read at once.

    Channels lie one after the other, each with all frames. To go back in a gzip stream is to unpack
    it anew, so all frames are read in one pass.
    """
    number = dict(zip(axes, shape, strict=True))
    is_apart = number.get("C", 1) > 1 and not axes.startswith("C")
    return max(number.get("Z", 1), number.get("T", 1)) if is_apart else 1


def _to_the_end(stack: Stack, file: IO[bytes]) -> Iterator[np.ndarray]:
    """The frames, and then what follows, so that gzip compares its checksum."""
    yield from stack.frames
    while file.read(1 << 20):
        pass


def _header(file: IO[bytes]) -> Any:
    """The header of a file with its pixels."""
    from nibabel import Nifti1Header, Nifti2Header

    start = file.read(4)
    file.seek(0)
    # The header's own size, in either byte order.
    sizes = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
    if len(start) < 4 or not sizes & {348, 540}:
        raise DecodeError("is no NIfTI file")
    kind = Nifti1Header if 348 in sizes else Nifti2Header
    # About extensions, which are not read.
    with warnings.catch_warnings(action="ignore"):
        header = kind.from_fileobj(file, check=False)
    magic = bytes(header["magic"].tobytes())
    if not magic.startswith((b"n+1", b"n+2")):
        raise DecodeError(
            "is one of a pair of files, or older than NIfTI", fix="Save it as one file .nii."
        )
    if not 1 <= int(header["dim"][0]) <= 7:
        raise DecodeError(f"declares {int(header['dim'][0])} axes")
    return header


def _spacing(header: Any) -> dict[str, float | None]:
    unit = _LENGTHS.get(int(header["xyzt_units"]) & 7)
    steps = np.abs(header["pixdim"][1:4].astype(float))
    return {axis: unit and float(step) * unit for axis, step in zip("XYZ", steps, strict=True)}


def _interval(header: Any) -> float | None:
    unit = _TIMES.get(int(header["xyzt_units"]) & 56)
    return unit and float(header["pixdim"][4]) * unit
