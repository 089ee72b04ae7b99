"""LIF files of Leica's LAS -> one stack, by the package liffile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np

from dist_train.data.raw.open_frames import Frames, OnlyFile, check_magic, holding
from dist_train.data.raw.stack import GREY, RGB, Choices, Stack, chosen_depth, chosen_series
from dist_train.data.raw.units import micrometres, names_of, regular_interval, seconds
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".lif",)
PACKAGES = ("liffile",)

_SAVE = "Export it from LAS X as OME-TIFF."
_DESCRIPTION = "./Data/Image/ImageDescription"
_MAGIC = b"\x70\0\0\0"
# Numbers of axes in the file, and of channels that are colours.
_AXES = {"1": "X", "2": "Y", "3": "Z", "4": "T"}
_RED, _BLUE = "1", "3"


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the stack of one image in a LIF file.

    Raises:
        DecodeError: pixels are missing, a choice is, or the axes or the values are not known.
    """
    from liffile import LifFile, LifFileType

    with ExitStack() as opened:
        file = opened.enter_context(open_plain(path))
        size = check_magic(file, _MAGIC, "LIF")
        form = LifFile(cast(Any, OnlyFile(file)), squeeze=False)
        # Other kinds of Leica's files consist of several, and name them.
        if form.type is not LifFileType.LIF:
            raise DecodeError(f"is no LIF file, but {form.type.name}", fix=_SAVE)
        images = list(form.images)
        image = images[chosen_series([one.path for one in images], choices.series)]
        if image.is_flim:
            raise DecodeError("holds arrival times of photons, no pictures", fix=_SAVE)
        sizes = {str(axis): int(count) for axis, count in image.sizes.items()}
        depth, plane = chosen_depth(sizes, choices)
        if [axis for axis in image.frames.frame_sizes if axis != "S"] != ["Y", "X"]:
            shown = "".join(image.sizes)
            raise DecodeError(f"has frames of other axes than row and column ({shown})", fix=_SAVE)
        axes = {
            _AXES.get(one.get("DimID", ""), ""): dict(one.attrib)
            for one in image.xml_element.findall(f"{_DESCRIPTION}/Dimensions/DimensionDescription")
        }
        described = image.xml_element.findall(f"{_DESCRIPTION}/Channels/ChannelDescription")
        described.sort(key=lambda one: int(one.get("BytesInc", 0)))
        _check_whole(image, axes, sizes, size)
        names = [one.get("NameOfMeasuredQuantity") or one.get("LUTName") for one in described]
        count = sizes.get("C", 1) * sizes.get("S", 1)
        # The package gives red, green, blue, also where blue comes first in the file.
        is_colour = sizes.get("S", 1) == count == 3 and described[0].get("ChannelTag") in (
            _RED,
            _BLUE,
        )
        bits = max(int(one.get("Resolution", 0)) for one in described)
        spacing = [micrometres(_step(axes.get(a, {})), axes.get(a, {}).get("Unit")) for a in "ZYX"]
        return Stack(
            frames=holding(_frames(image, sizes, depth, plane), opened),
            dtype=np.dtype(image.dtype),
            count=sizes.get(depth or "", 1),
            channels=RGB if is_colour else GREY if count == 1 else names_of(names, count),
            bits=bits if 8 < bits < 16 else None,
            spacing=(None if depth == "T" else spacing[0], spacing[1], spacing[2]),
            interval=_interval(image, axes, sizes, plane) if depth == "T" else None,
        )


def _check_whole(
    image: Any, axes: Mapping[str, Mapping[str, str]], sizes: Mapping[str, int], size: int
) -> None:
    """Raise DecodeError unless the file has all pixels, row by row without gaps."""
    try:
        block = image.memory_block
    except KeyError:
        raise DecodeError(
            "is cut short: its pixels are not there", fix="Replace the file."
        ) from None
    sample = image.dtype.itemsize * sizes.get("S", 1)
    steps = int(axes["X"]["BytesInc"]), int(axes["Y"]["BytesInc"])
    if steps != (sample, sample * sizes["X"]):
        raise DecodeError("has gaps between its pixels or rows", fix=_SAVE)
    needed = math.prod(sizes.values()) * image.dtype.itemsize
    there = min(block.size, size - block.offset)
    if needed > there:
        raise DecodeError(
            f"is cut short: {needed} bytes of pixels are declared, {there} are there",
            fix="Replace the file.",
        )


def _frames(image: Any, sizes: Mapping[str, int], depth: str | None, plane: int) -> Frames:
    other = {"T": "Z", "Z": "T"}.get(depth or "", "")
    fixed = {other: plane} if sizes.get(other, 1) > 1 else {}
    for at in range(sizes.get(depth or "", 1)):
        place = {**fixed, **({depth: at} if depth else {})}
        numbers = [{"C": number} for number in range(sizes["C"])] if "C" in sizes else [{}]
        channels = [image.frame(**place, **number) for number in numbers]
        if len(channels) == 1:
            yield channels[0]
        elif "S" in sizes:
            yield np.concatenate(channels, axis=-1)
        else:
            yield np.stack(channels, axis=-1)


def _step(axis: Mapping[str, str]) -> float | None:
    """Distance of the elements of an axis: its length is from the first to the last."""
    count = int(axis.get("NumberOfElements", 1))
    return abs(float(axis.get("Length", 0))) / (count - 1) if count > 1 else None


def _interval(
    image: Any,
    axes: Mapping[str, Mapping[str, str]],
    sizes: Mapping[str, int],
    plane: int,
) -> float | None:
    """Time between frames in seconds, by stamps of all pictures where there are some."""
    stamps = image.timestamps
    order = [axis for axis in image.sizes if axis in "TZC"]
    if stamps is not None and len(stamps) == math.prod(sizes[axis] for axis in order):
        place: dict[str, Any] = {"T": slice(None), "Z": plane, "C": 0}
        grid = stamps.astype(np.float64).reshape([sizes[axis] for axis in order])
        chosen: Sequence[float] = grid[tuple(place[axis] for axis in order)] / 1000
        return regular_interval(chosen)
    return seconds(_step(axes["T"]), axes["T"].get("Unit"))
