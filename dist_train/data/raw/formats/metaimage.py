"""MetaImage files with their values inside (.mha), as ITK writes them.

The header is lines "Key = Value", the last of them ElementDataFile. Axes are X, Y, Z and T, fastest
first; distances are in millimetres, unless DistanceUnits says otherwise.
Source: https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from dist_train.data.raw.axes import stack_from_axes
from dist_train.data.raw.damage import check_held, check_packed, reading
from dist_train.data.raw.stack import RGB, Choices, Stack
from dist_train.data.raw.units import MICROMETRES
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".mha", ".mhd")
PACKAGES = ()

_LENGTHS = {unit: MICROMETRES[unit] for unit in ("um", "mm", "cm", "m")}
_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    # Eight bytes on every machine, unlike MET_LONG.
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# Lines of a header, and bytes of a line.
_LINES, _LINE = 1000, 1 << 16


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Read a volume. All of it is held."""
    with reading(where), open_plain(path) as file:
        header = _header(file)
        if header["ElementDataFile"] != "LOCAL":
            raise DecodeError("has its values in another file", fix="Save both as one file .mha.")
        if header.get("ObjectType", "Image") != "Image" or not _is(header, "BinaryData", True):
            raise DecodeError("is no MetaImage of binary values", fix="Save it as one file .mha.")
        kind = header["ElementType"].removesuffix("_ARRAY")
        if kind not in _DTYPES:
            raise DecodeError(f"holds values of the type {kind}")
        big = _is(header, "BinaryDataByteOrderMSB") or _is(header, "ElementByteOrderMSB")
        dtype = np.dtype(("<>"[big]) + _DTYPES[kind])
        sizes = [int(size) for size in header["DimSize"].split()]
        channels = int(header.get("ElementNumberOfChannels", "1"))
        if len(sizes) != int(header["NDims"]) or not 2 <= len(sizes) <= 4 or min(sizes) < 1:
            raise DecodeError(f"has the sizes {header['DimSize']}, which are of no volume")
        shape = (*sizes[::-1], channels)
        values = _values(file, header, math.prod(shape) * dtype.itemsize)
        unit = _LENGTHS.get(header.get("DistanceUnits", "mm"), math.nan)
        steps = header.get("ElementSpacing", header.get("ElementSize", "")).split()
        return stack_from_axes(
            np.frombuffer(values, dtype).reshape(shape),
            "XYZT"[: len(sizes)][::-1] + "C",
            choices,
            dtype,
            # ITK has no sign that three channels are colours; of bytes they are.
            channels=RGB if channels == 3 and dtype.itemsize == 1 else None,
            spacing={axis: float(step) * unit for axis, step in zip("XYZ", steps, strict=False)},
        )


def _header(file: IO[bytes]) -> dict[str, str]:
    """The header's entries. The file is then at the values."""
    header: dict[str, str] = {}
    for _ in range(_LINES):
        line = file.readline(_LINE)
        key, sign, value = line.decode("latin-1").partition("=")
        if not sign or not line.endswith(b"\n"):
            break
        header[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return header
    raise DecodeError("is no MetaImage file")


def _is(header: Mapping[str, str], key: str, default: bool = False) -> bool:
    return header.get(key, str(default)).lower() in ("true", "1", "t")


def _values(file: IO[bytes], header: Mapping[str, str], declared: int) -> bytes:
    start = file.tell()
    held = file.seek(0, 2) - start
    file.seek(start)
    if int(header.get("HeaderSize", "0")):
        raise DecodeError("has a HeaderSize beside its header")
    if not _is(header, "CompressedData"):
        check_held(declared, held)
        return file.read(declared)
    check_packed(declared, held)
    unpacker = zlib.decompressobj()
    # One byte more, so that zlib reads on to its checksum.
    values = unpacker.decompress(file.read(), declared + 1)
    if len(values) != declared or not unpacker.eof:
        check_held(declared, len(values) - 1)
        raise DecodeError(f"declares {declared} bytes of values, and holds more")
    return values
