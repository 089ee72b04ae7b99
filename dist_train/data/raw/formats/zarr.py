"""Zarr arrays and OME-Zarr images (folders or zip archives) -> one stack, by the package zarr."""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dist_train.data.raw.axes import axis_of
from dist_train.data.raw.open_frames import Frames, holding
from dist_train.data.raw.stack import GREY, Choices, Stack, chosen_depth, chosen_series
from dist_train.data.raw.units import micrometres, names_of, seconds
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".zarr", ".zarr.zip")
PACKAGES = ("zarr",)
HAS_DATASETS = True

# Files that make a folder a group or an array of version 2 or 3.
_MARKS = ("zarr.json", ".zgroup", ".zarray")
# Arrays without names of axes, by the number of their axes.
_UNNAMED = {2: "YX", 3: "TYX"}


def reads_folder(path: Path) -> bool:
    """Whether a folder is a Zarr group or array."""
    return any((path / mark).is_file() for mark in _MARKS)


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the stack of one image, at full resolution.

    Axes are those of the OME metadata, of ``dimension_names``, or of xarray. Without names they are
    frames, rows and columns.

    Raises:
        DecodeError: a choice is missing, the axes are not known, or no chunk is there.
    """
    import zarr

    with ExitStack() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys, prefix = _keys(path)
        if path.is_dir():
            store: Any = zarr.storage.LocalStore(path, read_only=True)
        else:
            store = zarr.storage.ZipStore(path, mode="r")
        opened.callback(store.close)
        inside = str(PurePosixPath(prefix, choices.dataset or ""))
        if ".." in PurePosixPath(inside).parts or inside.startswith("/"):
            raise DecodeError(
                f"'{choices.dataset}' is no place in it", fix="Name a group or array."
            )
        try:
            root = zarr.open(store, mode="r", path="" if inside == "." else inside)
        except FileNotFoundError:
            raise DecodeError(
                f"holds no group or array{f' {choices.dataset!r}' if choices.dataset else ''}",
                fix="Name one by ::PATH behind the file's name." if choices.dataset else None,
            ) from None
        image = _image(root, choices)
        array = image.array
        if array.dtype.kind not in "biuf":
            raise DecodeError(f"holds {array.dtype} values", fix="Save it as numbers.")
        # The codec of this name of numcodecs runs what a file says.
        if "pickle" in json.dumps(array.metadata.to_dict(), default=str).lower():
            raise DecodeError("holds pickles", fix="Save it with another codec.")
        sizes = dict(zip(image.axes, array.shape, strict=True))
        if len(sizes) < len(image.axes) or not {"Y", "X"} <= sizes.keys() or 0 in sizes.values():
            raise DecodeError(
                f"has the axes {', '.join(image.axes)} of {list(array.shape)}, not frames, row and "
                "column",
                fix="Save it with the axes TYX, ZYX or, with channels, TCYX or ZCYX.",
            )
        depth, plane = chosen_depth(sizes, choices)
        fixed = {axis: 0 for axis in sizes if axis not in "CYX" and axis != depth}
        if depth and sizes.get(other := {"T": "Z", "Z": "T"}[depth], 1) > 1:
            fixed[other] = plane
        channels = sizes.get("C", 1)
        step = dict(zip(image.axes, array.chunks, strict=True)).get(depth or "", 1)
        return Stack(
            frames=holding(_frames(image, depth, fixed, step), opened),
            dtype=np.dtype(array.dtype).newbyteorder("="),
            count=sizes.get(depth or "", 1),
            channels=GREY if channels == 1 else names_of(image.channels, channels),
            spacing=(
                None if depth == "T" else image.scale("Z", micrometres),
                image.scale("Y", micrometres),
                image.scale("X", micrometres),
            ),
            interval=image.scale("T", seconds) if depth == "T" else None,
            damaged=_missing(image, keys, depth, fixed),
        )


@dataclass(frozen=True)
class _Image:
    """An array, and what is said of it: scales and units by the axes' names."""

    array: Any
    axes: Sequence[str]
    scales: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    channels: Sequence[str | None] = ()

    def scale(self, axis: str, to_unit: Any) -> float | None:
        found: float | None = to_unit(self.scales.get(axis), self.units.get(axis))
        return found


def _keys(path: Path) -> tuple[set[str], str]:
    """Return the names of all files, and the folder that an archive has at its top, if one."""
    if path.is_dir():
        keys = set()
        for folder, folders, files in os.walk(path):
            for name in (*folders, *files):
                if os.path.islink(os.path.join(folder, name)):  # noqa: PTH114, PTH118
                    raise DecodeError("holds links to other files", fix="Copy it without links.")
            keys |= {Path(folder, name).relative_to(path).as_posix() for name in files}
        return keys, ""
    with open_plain(path) as file:
        if not zipfile.is_zipfile(file):
            raise DecodeError("is no zip archive, or is cut short", fix="Replace the file.")
        with zipfile.ZipFile(file) as archive:
            keys = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {PurePosixPath(name).parts[0] for name in keys}
    is_inside = len(tops) == 1 and not keys & set(_MARKS)
    return keys, tops.pop() if is_inside else ""


def _image(root: Any, choices: Choices) -> _Image:
    """Return the image that a group or array is, or that is chosen in it."""
    if not hasattr(root, "arrays"):
        return _plain(root)
    said = dict(root.attrs)
    said = said.get("ome", said)
    if "plate" in said or "well" in said:
        inner = sorted(name for name, _ in root.groups())
        raise DecodeError(
            f"is a plate or a well of several images ({', '.join(inner[:8])})",
            fix="Name one by its path: plate.zarr::ROW/COLUMN/FIELD.",
        )
    if "bioformats2raw.layout" in said:
        names = sorted((n for n, _ in root.groups() if n.isdecimal()), key=int)
        return _image(root[names[chosen_series(names, choices.series)]], Choices())
    if "multiscales" in said:
        scales = said["multiscales"]
        names = [str(one.get("name", f"image {n}")) for n, one in enumerate(scales)]
        return _of_ome(root, scales[chosen_series(names, choices.series)], said)
    arrays = sorted(root.arrays())
    if len(arrays) == 1:
        return _plain(arrays[0][1])
    shown = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays[:8])
    raise DecodeError(
        f"holds {len(arrays)} arrays{f' ({shown})' if shown else ''}",
        fix="Name one by ::PATH behind the file's name.",
    )


def _plain(array: Any) -> _Image:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if names is None:
        if array.ndim not in _UNNAMED:
            raise DecodeError(
                f"has {array.ndim} axes without names",
                fix="Save it as OME-Zarr, or with dimension_names.",
            )
        return _Image(array, _UNNAMED[array.ndim])
    return _Image(array, [axis_of(name) for name in names])


def _of_ome(group: Any, scales: Mapping[str, Any], said: Mapping[str, Any]) -> _Image:
    """Return the first level of a multiscale image (OME-NGFF 0.1 to 0.5)."""
    level = scales["datasets"][0]
    array = group[level["path"]]
    # Before version 0.3 all images had these axes, and in it axes were names alone.
    axes = [one if isinstance(one, dict) else {"name": one} for one in scales.get("axes", "tczyx")]
    names = [axis_of(one["name"]) for one in axes]
    if len(names) != array.ndim:
        raise DecodeError(f"its metadata name {len(names)} axes, its array has {array.ndim}")
    found = [1.0] * len(axes)
    known = False
    for told in (level, scales):
        for one in told.get("coordinateTransformations", ()):
            if one.get("type") == "scale":
                found = [a * b for a, b in zip(found, one["scale"], strict=True)]
                known = True
    labels = [one.get("label") for one in said.get("omero", {}).get("channels", ())]
    return _Image(
        array,
        names,
        dict(zip(names, found, strict=True)) if known else {},
        {name: one.get("unit", "") for name, one in zip(names, axes, strict=True)},
        labels,
    )


def _missing(image: _Image, keys: set[str], depth: str | None, fixed: Mapping[str, int]) -> int:
    """Number of frames of which a chunk is not there.

    A chunk of fill values need not be written, and looks the same as one that was lost.

    Raises:
        DecodeError: hardly any chunk is there.
    """
    array = image.array
    chunks = getattr(array, "shards", None) or array.chunks
    name = array.metadata.encode_chunk_key
    prefix = f"{array.path}/" if array.path else ""
    grid = []
    for axis, size, chunk in zip(image.axes, array.shape, chunks, strict=True):
        grid.append([fixed[axis] // chunk] if axis in fixed else range(-(-size // chunk)))
    needed = math.prod(map(len, grid))
    there = sum(key.startswith(prefix) for key in keys)
    if needed > 1000 * there:
        raise DecodeError(f"has {there} of {needed} chunks", fix="Copy all of it.")
    lost = [at for at in itertools.product(*grid) if prefix + name(at) not in keys]
    if len(lost) == needed:
        raise DecodeError(f"has none of its {needed} chunks", fix="Copy all of it.")
    if depth is None:
        return int(bool(lost))
    along = list(image.axes).index(depth)
    size, chunk = array.shape[along], chunks[along]
    return sum(min(chunk, size - at * chunk) for at in {place[along] for place in lost})


def _frames(image: _Image, depth: str | None, fixed: Mapping[str, int], step: int) -> Frames:
    """Give the frames; ``step``, those of one chunk, are read at once."""
    kept = [axis for axis in image.axes if axis not in fixed]
    order = [kept.index(axis) for axis in (depth, "Y", "X", "C") if axis in kept]
    count = image.array.shape[list(image.axes).index(depth)] if depth else 1
    for start in range(0, count, step):
        place = tuple(
            fixed[axis]
            if axis in fixed
            else slice(start, start + step)
            if axis == depth
            else slice(None)
            for axis in image.axes
        )
        block = np.asarray(image.array[place]).transpose(order)
        block = block.astype(block.dtype.newbyteorder("="), copy=False)
        if "C" in kept and block.shape[-1] == 1:
            block = block[..., 0]
        yield from block if depth else block[None]
