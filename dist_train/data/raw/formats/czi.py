"""CZI files of Zeiss's ZEN -> one stack, by Zeiss's own library, pylibCZIrw."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dist_train.data.raw.open_frames import Frames, check_magic, holding
from dist_train.data.raw.stack import GREY, RGB, Choices, Stack, chosen_depth, chosen_series
from dist_train.data.raw.units import micrometres, names_of, seconds
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".czi",)
PACKAGES = ("pylibCZIrw",)

_SAVE = "Export it from ZEN as OME-TIFF."
_TYPES = {"Gray8": "u1", "Gray16": "u2", "Gray32Float": "f4"}
_TYPES |= {"Bgr24": "u1", "Bgr48": "u2", "Bgr96Float": "f4"}
_IMAGE = "./Metadata/Information/Image"


@dataclass(frozen=True)
class _Tile:
    """A picture in the file: its place on the axes other than Y and X, and in the plane."""

    at: Mapping[str, int]
    left: int
    top: int
    width: int
    height: int
    kind: str


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the stack of one scene in a CZI file.

    Raises:
        DecodeError: planes are missing, a choice is, or the axes or the values are not known.
    """
    with ExitStack() as opened, warnings.catch_warnings():
        # Its Python part is compiled with invalid escapes.
        warnings.simplefilter("ignore")
        czi = import_module("pylibCZIrw.czi")

        with open_plain(path) as file:
            size = check_magic(file, b"ZISRAWFILE", "CZI")
        form = opened.enter_context(czi.open_czi(str(path)))
        tiles = _tiles(form, size)
        scenes = sorted({tile.at.get("S", -1) for tile in tiles})
        root = ElementTree.fromstring(form.raw_metadata)
        named = [s.get("Name") for s in root.findall(f"{_IMAGE}/Dimensions/S/Scenes/Scene")]
        names = [f"scene {number}" for number in range(len(scenes))]
        if len(named) == len(names):
            names = [name or other for name, other in zip(named, names, strict=True)]
        scene = scenes[chosen_series(names, choices.series)]
        tiles = [tile for tile in tiles if tile.at.get("S", -1) == scene]
        axes = {axis for tile in tiles for axis in tile.at} - {"S", "M"}
        places = {axis: sorted({tile.at.get(axis, 0) for tile in tiles}) for axis in axes}
        for axis, at in places.items():
            declared = root.findtext(f"{_IMAGE}/Size{axis}") or "0"
            needed = max(at[-1] + 1 - at[0], int(declared) if len(scenes) == 1 else 0)
            if len(at) < needed:
                raise DecodeError(
                    f"has {len(at)} of {needed} planes on axis {axis}", fix="Replace the file."
                )
        depth, plane = chosen_depth({axis: len(at) for axis, at in places.items()}, choices)
        planes = _planes(places, depth, plane)
        box = _box(tiles, planes)
        kinds = {tile.kind for tile in tiles}
        kind = kinds.pop()
        if kinds or kind not in _TYPES:
            raise DecodeError(f"has values of the kinds {', '.join({kind, *kinds})}", fix=_SAVE)
        is_colour, channels = kind.startswith("Bgr"), len(planes[0])
        if is_colour and channels > 1:
            raise DecodeError(f"has {channels} channels of colours", fix=_SAVE)
        named = [
            c.get("Name") or c.get("Fluor")
            for c in root.findall(f"{_IMAGE}/Dimensions/Channels/Channel")
        ]
        grey = GREY if channels == 1 else names_of(named, channels)
        z, y, x = (
            micrometres(
                root.findtext(f"./Metadata/Scaling/Items/Distance[@Id='{axis}']/Value"), "m"
            )
            for axis in "ZYX"
        )
        step = f"{_IMAGE}/Dimensions/T/Positions/Interval/Increment"
        bits = root.findtext(f"{_IMAGE}/ComponentBitCount") or ""
        return Stack(
            frames=holding(_frames(form, planes, box, None if scene < 0 else scene, kind), opened),
            dtype=np.dtype(_TYPES[kind]),
            count=len(planes),
            channels=RGB if is_colour else grey,
            bits=int(bits) if bits.isdecimal() and 8 < int(bits) < 16 else None,
            spacing=(None if depth == "T" else z, y, x),
            interval=seconds(root.findtext(step), "s") if depth == "T" else None,
        )


def _tiles(form: Any, size: int) -> list[_Tile]:
    """Return the tiles at full resolution; others are levels of a pyramid.

    Args:
        size: bytes of the file.
    """
    tiles: list[_Tile] = []
    needed = 0

    def found(_: int, info: Any) -> bool:
        nonlocal needed
        box, stored = info.logicalRect, info.physicalSize
        if (box.w, box.h) == (stored.w, stored.h):
            kind = info.pixelType.name
            at = {str(axis): int(place) for axis, place in info.coordinate.to_dict().items()}
            tiles.append(_Tile(at, box.x, box.y, box.w, box.h, kind))
            if info.compressionModeRaw == 0:
                each = np.dtype(_TYPES.get(kind, "u1")).itemsize * (3 if "Bgr" in kind else 1)
                needed += box.w * box.h * each
        return True

    form.enumerate_subblocks(found)
    if needed > size:
        raise DecodeError(
            f"is cut short: {needed} bytes of pixels are declared, {size} are there",
            fix="Replace the file.",
        )
    return tiles


def _planes(
    places: Mapping[str, Sequence[int]], depth: str | None, plane: int
) -> list[list[dict[str, int]]]:
    """Return the planes of each frame, one for each channel, as the library names them."""
    ranges = {axis: at for axis, at in places.items() if axis not in (depth, "C")}
    fixed = {axis: at[plane if len(at) > 1 else 0] for axis, at in ranges.items()}
    channels = [{"C": at} for at in places.get("C", ())] or [{}]
    frames = [{depth: at} for at in places[depth]] if depth else [{}]
    return [[{**fixed, **frame, **channel} for channel in channels] for frame in frames]


def _box(tiles: Sequence[_Tile], planes: Sequence[Sequence[Mapping[str, int]]]) -> _Tile:
    """Return the box that the tiles of each plane fill.

    Raises:
        DecodeError: they do not. The library gives black there.
    """
    left, top = min(tile.left for tile in tiles), min(tile.top for tile in tiles)
    right = max(tile.left + tile.width for tile in tiles)
    bottom = max(tile.top + tile.height for tile in tiles)
    of_plane: dict[tuple[tuple[str, int], ...], list[_Tile]] = {}
    for tile in tiles:
        key = tuple(sorted((axis, at) for axis, at in tile.at.items() if axis not in "SM"))
        of_plane.setdefault(key, []).append(tile)
    for number, plane in enumerate(itertools.chain.from_iterable(planes)):
        there = of_plane.get(tuple(sorted(plane.items())), [])
        if not there:
            raise DecodeError(
                f"plane {number} of {len(planes) * len(planes[0])} is not there",
                fix="Replace the file.",
            )
        if not _filled(there, (left, top, right, bottom)):
            raise DecodeError("its tiles leave gaps in the picture", fix=_SAVE)
    return _Tile({}, left, top, right - left, bottom - top, "")


def _filled(tiles: Sequence[_Tile], box: tuple[int, int, int, int]) -> bool:
    """Whether tiles fill a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    xs = sorted({left, right} | {t.left for t in tiles} | {t.left + t.width for t in tiles})
    ys = sorted({top, bottom} | {t.top for t in tiles} | {t.top + t.height for t in tiles})
    filled = np.zeros((len(ys) - 1, len(xs) - 1), bool)
    for t in tiles:
        rows = slice(ys.index(t.top), ys.index(t.top + t.height))
        filled[rows, xs.index(t.left) : xs.index(t.left + t.width)] = True
    return bool(filled.all())


def _frames(
    form: Any,
    planes: Sequence[Sequence[dict[str, int]]],
    box: _Tile,
    scene: int | None,
    kind: str,
) -> Frames:
    roi = (box.left, box.top, box.width, box.height)
    for channels in planes:
        read = [form.read(roi=roi, plane=plane, scene=scene, pixel_type=kind) for plane in channels]
        # Colours are stored as blue, green, red.
        frame = read[0][..., ::-1] if kind.startswith("Bgr") else np.concatenate(read, axis=-1)
        yield frame[..., 0] if frame.shape[-1] == 1 else frame
