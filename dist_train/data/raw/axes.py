"""An array with named axes -> a stack of frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from dist_train.data.raw.damage import reading
from dist_train.data.raw.open_frames import Frames, holding
from dist_train.data.raw.stack import ALPHA, GREY, RGB, Choices, Stack, chosen_depth
from dist_train.errors import DecodeError

# Names that files give to axes.
_NAMES = {"time": "T", "depth": "Z", "plane": "Z", "channel": "C", "row": "Y"}
_NAMES |= {"column": "X", "col": "X"}


def axis_of(name: object) -> str:
    """T, Z, C, Y or X, or the name itself in capitals."""
    return _NAMES.get(str(name).lower(), str(name).upper())


class LazyArray(Protocol):
    """An array, or a file's array that is read where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, place: Any, /) -> Any: ...


def stack_from_axes(
    array: LazyArray,
    axes: str,
    choices: Choices,
    dtype: np.dtype[Any],
    *,
    channels: Sequence[str] | None = None,
    spacing: Mapping[str, float | None] | None = None,
    interval: float | None = None,
    window: tuple[float, float] | None = None,
    block: int = 1,
) -> Stack:
    """Return the frames of an array, read as they are needed.

    Args:
        axes: a letter for each axis: X, Y, Z, T, C (channels), or another, which must be 1 long.
        dtype: of the array's values.
        channels: their names; by number if None.
        spacing: of the axes X, Y and Z in µm.
        interval: along T, in seconds.
        block: number of frames that are read at once, as they lie together in the file.

    Raises:
        DecodeError: the array is empty or has no numbers, or its axes have to be chosen.
    """
    sizes = dict(zip(axes, map(int, array.shape), strict=True))
    if 0 in sizes.values():
        raise DecodeError(f"has shape {list(array.shape)}, which holds no value")
    native = checked_dtype(dtype)
    depth, plane = chosen_depth(sizes, choices)
    count = sizes[depth] if depth else 1
    kept = [axis for axis in axes if axis in ("Y", "X", depth) or (axis == "C" and sizes["C"] > 1)]
    order = [kept.index(axis) for axis in (depth, "Y", "X", "C") if axis in kept]

    def frames() -> Iterator[np.ndarray]:
        for start in range(0, count, block):
            place = [
                slice(start, start + block)
                if axis == depth
                else slice(None)
                if axis in kept
                else plane
                if axis in "TZ"
                else 0
                for axis in axes
            ]
            # Scaled values beyond float32 become infinite, which counts as no number.
            with np.errstate(over="ignore"):
                part = np.asarray(array[tuple(place)]).astype(native, copy=False).transpose(order)
            yield from part if depth else [part]

    number = sizes.get("C", 1)
    if number == 1:
        channels = GREY
    elif channels is None:
        channels = [f"channel {n}" for n in range(number)]
    lengths = {axis: length for axis, length in (spacing or {}).items() if is_length(length)}
    return Stack(
        frames(),
        native,
        count,
        tuple(channels),
        window=window,
        # Frames in time have no distance.
        spacing=(None if depth == "T" else lengths.get("Z"), lengths.get("Y"), lengths.get("X")),
        interval=interval if depth == "T" and is_length(interval) else None,
    )


def while_open(where: object, opened: AbstractContextManager[Stack]) -> Stack:
    """Return a stack whose file is open until its frames are read or dropped.

    Args:
        where: the file's name in messages.
        opened: opens the file.
    """

    def frames() -> Frames:
        with reading(where):
            yield from stack.frames

    with ExitStack() as held:
        with reading(where):
            stack = held.enter_context(opened)
        return replace(stack, frames=holding(frames(), held))


def plain_stack(array: np.ndarray, choices: Choices | None = None) -> Stack:
    """Return the stack of an array without metadata (see ``axes_of_plain``)."""
    choices = choices or Choices()
    axes, channels = axes_of_plain(array.shape, choices)
    return stack_from_axes(array, axes, choices, array.dtype, channels=channels)


def axes_of_plain(shape: Sequence[int], choices: Choices) -> tuple[str, tuple[str, ...] | None]:
    """Return the axes of an array without metadata, and the names of its channels.

    A picture, [H, W] or [H, W, 3 or 4] in colour; a volume, [D, H, W] or [D, H, W, 1]; in colour,
    [D, H, W, 3 or 4]; with other channels, [D, H, W, C], only if these are chosen.

    Raises:
        DecodeError: the array has another shape.
    """
    colour = (*RGB, ALPHA)[: shape[-1]] if shape and shape[-1] in (3, 4) else None
    if len(shape) == 2:
        return "YX", None
    if len(shape) == 3:
        return ("YXC", colour) if colour else ("ZYX", None)
    if len(shape) == 4:
        if colour or shape[-1] == 1:
            return "ZYXC", colour
        if choices.channels not in ("auto", "grey", "rgb"):
            return "ZYXC", None
    raise DecodeError(
        f"has shape {list(shape)}, not [depth, height, width]",
        fix="Choose --channels if the last of four axes is that of the channels."
        if len(shape) == 4
        else None,
    )


def checked_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a type of integers, floats or bool in this machine's byte order.

    Raises:
        DecodeError: it is another type.
    """
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DecodeError(f"holds {dtype} values", fix="Use uint8, uint16, int16 or float32.")
    return dtype.newbyteorder("=")


def is_length(value: float | None) -> bool:
    """Whether a number can be a distance or a duration."""
    return value is not None and math.isfinite(value) and value > 0
