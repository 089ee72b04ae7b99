"""What a reader of a file format gives: frames with their metadata, chosen from the file's axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_train.data.types import GREY as GREY
from dist_train.errors import ConfigError, DecodeError

RGB = ("red", "green", "blue")
ALPHA = "alpha"
#: BT.601.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Choices:
    """What to take from a file that holds more than one stack of grey pictures.

    Attributes:
        depth_axis: time or depth, where a file has both.
        plane: position on the other one of the two axes, from 0.
        channels: "auto", "grey", "rgb", "all", or numbers from 0 such as "0,2".
        series: number of the image, scene or series in the file, from 0.
        dataset: path of the array within the file (HDF5, Zarr): what follows "::" in its name.
    """

    depth_axis: Literal["T", "Z"] | None = None
    plane: int | None = None
    channels: str = "auto"
    series: int | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Stack:
    """One clip as its file has it.

    Attributes:
        frames: [H, W], or [H, W, C] with several channels, one after the other; read once.
        dtype: of the frames.
        count: number of frames that the file declares; fewer are read from a damaged file.
        channels: their names; ``GREY``, or ``RGB`` with or without ``ALPHA``, or the file's own.
        bits: bits in use in integer values by the file's metadata, None if it does not say.
        window: the values that the file's metadata make black and white.
        spacing: distance of frames, rows and columns in µm, None where the file does not say.
        interval: time between frames in seconds.
        damaged: number of damaged frames.
        stopped_by: why frames are missing.
    """

    frames: Iterable[np.ndarray]
    dtype: np.dtype[np.generic]
    count: int
    channels: tuple[str, ...] = GREY
    bits: int | None = None
    window: tuple[float, float] | None = None
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)
    interval: float | None = None
    damaged: int = 0
    stopped_by: str | None = None


def check_channels(channels: str) -> str:
    """Return the setting ``Choices.channels`` if it has a known form.

    Raises:
        ConfigError: it has not.
    """
    numbers = channels.split(",")
    if channels not in ("auto", "grey", "rgb", "all") and not (
        all(n.strip().isdecimal() for n in numbers) and len(set(map(int, numbers))) == len(numbers)
    ):
        raise ConfigError(
            f"'{channels}' names no channels",
            where="--channels",
            fix="It is auto, grey, rgb, all, or different numbers from 0 such as 0,2.",
        )
    return channels


def chosen_channels(names: Sequence[str], channels: str) -> tuple[int, ...] | None:
    """Return the positions of the chosen channels, None for the luma of red, green and blue.

    A single channel, and luma of a colour picture, need no choice ("auto"). Other channels do.

    Raises:
        DecodeError: the channels are not there, or have to be chosen.
    """
    is_colour = tuple(names[:3]) == RGB
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    if channels in ("auto", "grey"):
        if len(names) == 1:
            return (0,)
        if is_colour:
            return None
        raise DecodeError(
            f"has {len(names)} channels ({shown})",
            fix="Choose them: --channels all, or numbers such as --channels 0.",
        )
    if channels == "rgb":
        if is_colour:
            return (0, 1, 2)
        raise DecodeError(f"has no red, green and blue, but {shown}", fix="Choose --channels all.")
    if channels == "all":
        return tuple(n for n, name in enumerate(names) if name != ALPHA)
    numbers = tuple(map(int, channels.split(",")))
    if max(numbers) >= len(names):
        raise DecodeError(f"has no channel {max(numbers)}, but {shown}", fix="See --channels.")
    return numbers


def chosen_depth(sizes: Mapping[str, int], choices: Choices) -> tuple[str | None, int]:
    """Return the axis of the frames, T or Z (None for one picture), and the plane of the other.

    Args:
        sizes: of the file's axes; those other than T, Z, C, S, Y and X must have size 1.

    Raises:
        DecodeError: another axis is longer than 1, or both are and none is chosen.
    """
    long = {axis: size for axis, size in sizes.items() if size > 1 and axis not in "CSYX"}
    shown = ", ".join(f"{axis} of {size}" for axis, size in long.items())
    if unknown := [axis for axis in long if axis not in "TZ"]:
        raise DecodeError(
            f"has the axes {shown}: {unknown[0]} is neither time nor depth",
            fix="Save it as one stack of pictures, with the axes TYX or ZYX.",
        )
    if len(long) < 2:
        return next(iter(long), None), 0
    if choices.depth_axis is None:
        raise DecodeError(
            f"has both time and depth ({shown})",
            fix="Choose the axis of the frames by --depth-axis, and --plane of the other one.",
        )
    other = "Z" if choices.depth_axis == "T" else "T"
    if choices.plane is None or choices.plane >= long[other]:
        raise DecodeError(
            f"has {other} of {long[other]} beside {choices.depth_axis}",
            fix=f"Choose one of them by --plane, from 0 to {long[other] - 1}.",
        )
    return choices.depth_axis, choices.plane


def chosen_series(names: Sequence[str], series: int | None) -> int:
    """Return the number of the chosen image of a file.

    Raises:
        DecodeError: it is not there, or has to be chosen.
    """
    if series is None and len(names) == 1:
        return 0
    if series is None or series >= len(names):
        shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:8]))
        raise DecodeError(
            f"holds {len(names)} series of pictures ({shown}{', ...' if len(names) > 8 else ''})"
            if names
            else "holds no picture",
            fix="Choose one by --series.",
        )
    return series
