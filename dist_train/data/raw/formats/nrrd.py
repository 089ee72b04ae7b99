"""NRRD files with their values inside (.nrrd), by pynrrd.

Axes are told by their kinds; those of space are X, Y and Z in the file's order, fastest first, and
a fourth is time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.raw.axes import stack_from_axes
from dist_train.data.raw.damage import reading
from dist_train.data.raw.stack import ALPHA, RGB, Choices, Stack
from dist_train.data.raw.units import MICROMETRES
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".nrrd", ".nhdr")
PACKAGES = ("pynrrd",)

# http://teem.sourceforge.net/nrrd/format.html, "kinds".
_OF_SPACE = ("domain", "space", "none", "???", "")
_COLOURS = {"rgb-color": RGB, "rgba-color": (*RGB, ALPHA)}
_CHANNELS = ("list", "vector", "point", "3-color", "4-color", "2-vector", "3-vector", "4-vector")
_UNITS = ("um", "µm", "micron", "microns", "mm", "cm", "m")
# Unicode has a second micro sign.
_LENGTHS = {"μm": MICROMETRES["µm"]} | {unit: MICROMETRES[unit] for unit in _UNITS}
_SECONDS = {"s": 1.0, "ms": 1e-3}
# The patient's axes, as DICOM and ITK have them: in millimetres. The unit of time is not known.
_PATIENT = re.compile(r"(?:left|right)-(?:anterior|posterior)-superior(?:-time)?|[lr][ap]st?", re.I)


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Read a volume. All of it is held, as pynrrd reads it at once."""
    import nrrd

    with reading(where), open_plain(path) as file:
        if file.read(4) != b"NRRD":
            raise DecodeError("is no NRRD file")
        file.seek(0)
        header = nrrd.read_header(file)
        # pynrrd would open it.
        if "data file" in header or "datafile" in header:
            raise DecodeError("has its values in another file", fix="Save both as one file .nrrd.")
        if min(header["sizes"], default=0) < 1:
            raise DecodeError(f"has sizes {list(header['sizes'])}, which hold no value")
        # Memory is taken as bytes are read, and not by the header.
        array = nrrd.read_data(header, file, index_order="C")
        axes, colours = _axes(header)
        return stack_from_axes(
            array,
            axes[::-1],
            choices,
            array.dtype,
            channels=colours,
            spacing={a: _step(header, n, _LENGTHS) for n, a in enumerate(axes) if a in "XYZ"},
            interval=_step(header, axes.index("T"), _SECONDS) if "T" in axes else None,
        )


def _axes(header: Mapping[str, Any]) -> tuple[str, tuple[str, ...] | None]:
    """The letters of the axes, fastest first, and the colours' names."""
    number = len(header["sizes"])
    kinds = [str(kind).lower() for kind in header.get("kinds", ["domain"] * number)]
    if len(kinds) != number:
        raise DecodeError(f"has {number} axes, and kinds of {len(kinds)}")
    axes, of_space, colours = "", iter("XYZTUVW"), None
    for kind in kinds:
        if kind in _OF_SPACE:
            axes += next(of_space, "?")
        elif kind == "time":
            axes += "T"
        elif kind in _COLOURS or kind in _CHANNELS:
            axes, colours = f"{axes}C", _COLOURS.get(kind)
        else:
            raise DecodeError(f"has an axis of the kind {kind}")
    if len(set(axes)) < len(axes) or not {"X", "Y"} <= set(axes):
        raise DecodeError(f"has axes of the kinds {', '.join(kinds)}", fix="Save one volume.")
    return axes, colours


def _step(header: Mapping[str, Any], axis: int, units: Mapping[str, float]) -> float | None:
    """Distance along an axis in µm, or in s for time; None if the file does not say.

    Args:
        units: those that the axis may have.
    """
    directions, steps = header.get("space directions"), header.get("spacings")
    own = header.get("units") or [""] * len(header["sizes"])
    unit = str(own[axis])
    if directions is not None:
        direction = np.asarray(directions[axis], float)
        step = float(np.linalg.norm(direction))
        # One for each direction of space, which an axis may be at an angle to.
        of_space = list(header.get("space units") or ())
        if not of_space and _PATIENT.fullmatch(str(header.get("space", ""))):
            of_space = ["mm", "mm", "mm"]
        along = set(map(str, (of_space[n] for n in np.flatnonzero(direction) if n < len(of_space))))
        unit = along.pop() if len(along) == 1 else unit
    elif steps is not None:
        step = float(steps[axis])
    else:
        return None
    return units[unit] * step if unit in units else None
