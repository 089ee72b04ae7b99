"""A folder of pictures: one clip, in the order of the one number in which their names differ."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from dist_train.data.raw.picture import PACKAGES as PACKAGES
from dist_train.data.raw.picture import Picture, is_picture, lies_beside, read_picture
from dist_train.data.raw.stack import Choices, Stack
from dist_train.errors import DecodeError

# A clip is the folder; single files are clips of other formats.
SUFFIXES: tuple[str, ...] = ()
_FIX = "Name the pictures alike but for one number, such as frame0001.png."


def reads_folder(path: Path) -> bool:
    """Whether the folder holds a picture."""
    return any(is_picture(inner.name) for inner in path.iterdir())


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the pictures of a folder as a stack.

    Pictures are read one at a time. They must be of one size and kind. ``stopped_by`` tells of the
    first gap in the numbers, whose step is the least one.

    Raises:
        DecodeError: the folder holds other files, the names give no order, or a picture cannot be
            read.
    """
    names, gap, count = _in_order(_pictures_in(path))
    first = _read(path, names[0])

    def frames() -> Iterator[np.ndarray]:
        yield first.values
        for name in names[1:]:
            picture = _read(path, name)
            if _kind(picture) != _kind(first):
                raise DecodeError(
                    f"its picture {name} is {_shown(picture)}; {names[0]} is {_shown(first)}",
                    fix="Save all of them in one size and kind.",
                )
            yield picture.values

    return Stack(
        frames(),
        first.values.dtype,
        count,
        channels=first.channels,
        bits=first.bits,
        window=first.window,
        stopped_by=gap,
    )


def _pictures_in(path: Path) -> list[str]:
    names = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        name = entry.name
        if is_picture(name) and entry.is_file():
            names.append(name)
        elif not (name.startswith(".") or (lies_beside(name) and entry.is_file())):
            raise DecodeError(
                f"its pictures lie beside {name}, which is no picture",
                fix="Give the pictures of a clip a folder of their own.",
            )
    if not names:
        raise DecodeError("holds no picture")
    return names


def _in_order(names: Sequence[str]) -> tuple[list[str], str | None, int]:
    """Return the names in order, the first gap, and the number of pictures without gaps.

    Raises:
        DecodeError: the names differ in more than one number, or not by its value.
    """
    parts = [re.split("([0-9]+)", name.casefold()) for name in names]
    for name, one in zip(names, parts, strict=True):
        if one[::2] != parts[0][::2]:
            raise DecodeError(f"holds the pictures {names[0]} and {name}, in no order", fix=_FIX)
    columns = [tuple(map(int, column)) for column in list(zip(*parts, strict=True))[1::2]]
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) > 1 or (len(names) > 1 and not varying):
        raise DecodeError(
            f"holds pictures whose names differ in {len(varying) or 'no'} numbers, such as "
            f"{names[0]} and {names[-1]}",
            fix=_FIX,
        )
    if not varying:
        return list(names), None, 1
    ordered = sorted(zip(varying[0], names, strict=True))
    steps = [after[0] - before[0] for before, after in pairwise(ordered)]
    in_order = [name for _, name in ordered]
    if 0 in steps:
        place = steps.index(0)
        raise DecodeError(
            f"holds {in_order[place]} and {in_order[place + 1]}, of one number", fix=_FIX
        )
    step = min(steps)
    if max(steps) == step:
        return in_order, None, len(names)
    place = next(place for place, one in enumerate(steps) if one != step)
    gap = f"no picture is between {in_order[place]} and {in_order[place + 1]}"
    return in_order, gap, max(len(names) + 1, sum(steps) // step + 1)


def _read(folder: Path, name: str) -> Picture:
    try:
        return read_picture(folder / name, name)
    except DecodeError as error:
        raise DecodeError(f"its picture {name} {error.what}", fix=error.fix) from None


def _kind(picture: Picture) -> tuple[object, ...]:
    values = picture.values
    return values.shape, values.dtype, picture.channels, picture.bits, picture.window


def _shown(picture: Picture) -> str:
    height, width = picture.values.shape[:2]
    colour = "grey" if picture.values.ndim == 2 else "RGB"
    bits = f" of {picture.bits} bits" if picture.bits else ""
    highest = f" up to {picture.window[1]:g}" if picture.window else ""
    return f"{width} x {height} {colour} {picture.values.dtype}{bits}{highest}"
