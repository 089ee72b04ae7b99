"""TIFF files -> one stack, by the series, axes, photometric and depth that they declare.

A file that is not a plain stack of pictures, or is incomplete, is refused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import IO, Any, Literal

import numpy as np
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage, TiffPageSeries

from dist_train.errors import DecodeError

# Axes that may be depth: depth, time, images, and tifffile's Q for an axis without a name.
_DEPTH = "ZTIQ"
_NAMES = {"Z": "depth", "T": "time", "C": "channel", "S": "sample", "Y": "row", "X": "column"}
_PLAIN = "Save it as one stack of grey or RGB pictures, with the axes ZYX or TYX."
# Tags of sizes, colours, the places of the pixels, and descriptions.
_NEEDED = {254, *range(256, 260), 262, 266, 270, 273, 274, *range(277, 280), 284, 317, 320}
_NEEDED |= {*range(322, 326), 338, 339}
_RGB_JPEG = (COMPRESSION.JPEG, COMPRESSION.OJPEG)

# tifffile's messages are judged here, and not shown.
_LOG = logging.getLogger("tifffile")
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())


def read_tiff(file: IO[bytes], where: object) -> np.ndarray:
    """Return the stack in a TIFF file: [D, H, W], or [D, H, W, 3 or 4] in colour.

    Single pages make one stack. White-is-zero is inverted, and a palette is applied.

    Raises:
        DecodeError: the file has several stacks, other axes than depth, row and column, or unknown
            colours; it is one of a set; or pages or needed tags are missing.
    """
    messages = _GraveMessages()
    _LOG.addHandler(messages)
    try:
        # OME-TIFF refers to its pages by the file's name.
        array = _read(file, PurePath(str(where)).name)
        if messages.last:
            raise DecodeError(
                f"cannot be read as it is meant ({messages.last})",
                fix="Replace the file, or save all of it anew as one stack.",
            )
    except DecodeError as error:
        raise DecodeError(error.what, where=where, fix=error.fix) from None
    finally:
        _LOG.removeHandler(messages)
    return array


def _read(file: IO[bytes], name: str) -> np.ndarray:
    with TiffFile(_OnlyFile(file), name=name, _multifile=False) as tif:
        # First of all: tifffile follows some damaged chains of pages without an end.
        _check_chain(tif)
        _check_alone(tif)
        series = tif.series
        if not series:
            raise DecodeError("holds no picture")
        if tif.is_ome and series[0].kind != "ome":
            raise DecodeError("its OME metadata do not fit its pages", fix=_PLAIN)
        for one in series:
            _check_whole(tif, one)
        page = series[0].keyframe
        stacks = [_stack(one) for one in _one_stack(series)]
        array = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
        return _upright(_positive(array, page), page)


def tiff_values(file: IO[bytes]) -> tuple[np.dtype[Any] | None, int | None]:
    """Return the type of a TIFF file's values, and their depth by its metadata, without pixels."""
    with TiffFile(_OnlyFile(file), name="", _multifile=False) as tif:
        page = tif.pages.first
        return page.dtype, _bits(tif, page)


class _GraveMessages(logging.Handler):
    """Keeps the last message about a file that tifffile reads in part, or wrongly."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if tag := re.search(r"TiffTag (\d+) ", text):
            is_grave = "fromfile" in text and int(tag[1]) in _NEEDED
        else:
            is_grave = record.levelno >= logging.ERROR or " series " in text
        if is_grave:
            self.last = re.sub(r"^<tifffile\.\w+ .*?> ", "", text)


class _OnlyFile:
    """A file without a descriptor, so that tifffile looks for no other files of a set."""

    def __init__(self, file: IO[bytes]) -> None:
        self.name = ""
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close
        self.closed = False

    def readinto(self, buffer: bytearray | memoryview) -> int:
        data = self.read(len(memoryview(buffer).cast("B")))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)


def _one_stack(series: Sequence[TiffPageSeries]) -> Sequence[TiffPageSeries]:
    """Return the series if there is one, or if all are single pictures of one kind."""
    if len(series) == 1:
        return series
    shapes = {one.get_shape(squeeze=True) for one in series}
    pictures = all(_frames(one) == 1 for one in series)
    alike = {(one.dtype, one.keyframe.photometric, one.get_axes(squeeze=True)) for one in series}
    if not pictures or len(shapes) > 1 or len(alike) > 1:
        first = ", ".join(f"{one.axes} {list(one.shape)}" for one in series[:3])
        more = ", ..." if len(series) > 3 else ""
        raise DecodeError(
            f"holds {len(series)} series of pictures ({first}{more})",
            fix="Save the one that you need as a separate file.",
        )
    return series


def _frames(series: TiffPageSeries) -> int:
    sizes = zip(series.axes, series.shape, strict=True)
    return int(math.prod(size for axis, size in sizes if axis not in "YXS"))


def _stack(series: TiffPageSeries) -> np.ndarray:
    """Return a series as [D, H, W], or [D, H, W, S] with the samples of colour."""
    axes, shape = series.axes, series.shape
    kept = [
        n
        for n, (axis, size) in enumerate(zip(axes, shape, strict=True))
        if axis in "YX" or size > 1
    ]
    names = "".join(axes[n] for n in kept)
    rest = names.replace("S", "")
    if not re.fullmatch(f"[{_DEPTH}]?YX", rest) or names.count("S") > 1:
        raise DecodeError(
            f"has the axes {names} of {[shape[n] for n in kept]}"
            f"{_explained(rest)}, not depth, row and column",
            fix=_PLAIN,
        )
    array: np.ndarray = series.asarray().reshape([shape[n] for n in kept])
    if "S" in names:
        colours = series.keyframe.photometric
        is_rgb = colours == PHOTOMETRIC.RGB or (
            # tifffile gives RGB for JPEG.
            colours == PHOTOMETRIC.YCBCR and series.keyframe.compression in _RGB_JPEG
        )
        samples = array.shape[names.index("S")]
        if not is_rgb or samples not in (3, 4):
            raise DecodeError(
                f"has {samples} samples a pixel ({names}, {colours.name}), which are no RGB",
                fix=_PLAIN,
            )
        array = np.moveaxis(array, names.index("S"), -1)
    return array if rest != "YX" else array[None]


def _explained(axes: str) -> str:
    known = [f"{axis} is {_NAMES[axis]}" for axis in axes if axis in "ZTC"]
    return f" ({', '.join(known)})" if known else ""


def _positive(array: np.ndarray, page: TiffPage) -> np.ndarray:
    """Return the stack with black at 0, fewer than 8 bits spread, and a palette applied."""
    photometric = page.photometric
    if array.dtype == np.uint8 and page.bitspersample < 8 and photometric != PHOTOMETRIC.PALETTE:
        most = (1 << page.bitspersample) - 1
        array = np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)[array]
    if photometric == PHOTOMETRIC.MINISWHITE:
        if array.dtype == np.bool_:
            return np.asarray(np.logical_not(array))
        if array.dtype.kind == "u":
            bits = max(8, int(page.bitspersample))
            return np.asarray((1 << bits) - 1 - array, array.dtype)
    elif photometric == PHOTOMETRIC.PALETTE:
        palette = page.colormap
        if palette is None or array.ndim != 3:
            raise DecodeError("has no palette for its colours", fix=_PLAIN)
        # Its values have 16 bits. Some writers fill only 8, which libtiff also accepts.
        palette = (palette >> 8 if palette.max() > 255 else palette).astype(np.uint8)
        return np.asarray(palette.T[array])
    elif array.ndim == 3 and photometric not in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
        raise DecodeError(f"its colours are {photometric.name}", fix=_PLAIN)
    return array


def _upright(array: np.ndarray, page: TiffPage) -> np.ndarray:
    """Turn the pictures upright (TIFF 6.0, Orientation)."""
    orientation = page.tags.valueof("Orientation", 1)
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        array = array[:, ::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, :, ::-1]
    return array


def _bits(tif: TiffFile, page: TiffPage) -> int | None:
    """Depth of the values by the metadata, None if it is 8 or 16 bits."""
    declared = [page.bitspersample]
    if tif.ome_metadata:
        declared += map(int, re.findall(r'\bSignificantBits="(\d{1,2})"', tif.ome_metadata))
    return max((bits for bits in declared if 8 < bits < 16), default=None)


def _check_alone(tif: TiffFile) -> None:
    if not tif.is_ome or not tif.ome_metadata:
        return
    text = tif.ome_metadata
    files = set(re.findall(r"<(?:\w+:)?UUID\b[^>]*>\s*([^<]*?)\s*</", text))
    if len(files) > 1 or re.search(r"<(?:\w+:)?BinaryOnly\b", text):
        raise DecodeError(
            "is one file of an OME set, whose metadata are for all of them",
            fix="Save the whole set as one stack.",
        )


def _check_whole(tif: TiffFile, series: TiffPageSeries) -> None:
    """Raise DecodeError unless the file has all pixels that the series declares."""
    size, frames = tif.filehandle.size, _frames(series)
    start, declared = series.dataoffset, _declared(tif, series)
    if start is not None and start + series.nbytes > size:
        held = max(0, size - start) // max(1, series.nbytes // max(1, frames))
        raise _cut(f"{frames} frames are declared, {held} are there")
    if declared > frames:
        raise _cut(f"{declared} frames are declared, {frames} are there")
    for number, page in enumerate(series.pages if start is None else ()):
        if page is None:
            raise _cut(f"{frames} frames are declared, page {number} is not there")
        ends = zip(page.dataoffsets, page.databytecounts, strict=True)
        if any(count == 0 or offset + count > size for offset, count in ends):
            raise _cut(f"pixels of page {number} of {frames} are not there")


def _declared(tif: TiffFile, series: TiffPageSeries) -> int:
    """Number of frames by ImageJ's or tifffile's description, 0 without one."""
    if tif.is_imagej and tif.imagej_metadata:
        sizes = [tif.imagej_metadata.get(name, 1) for name in ("channels", "slices", "frames")]
        return max(int(tif.imagej_metadata.get("images", 1)), int(math.prod(sizes)))
    description = series.keyframe.shaped_description
    if description is None:
        return 0
    shape = tifffile.tifffile.shaped_description_metadata(description)["shape"]
    return int(_frames(series) * math.prod(shape) // max(1, series.size))


def _check_chain(tif: TiffFile) -> None:
    """Follow the chain of the pages' directories to its end.

    tifffile takes a directory that it cannot read for the end of the chain.
    """
    form, size = tif.tiff, tif.filehandle.size
    order: Literal["little", "big"] = "little" if form.byteorder == "<" else "big"
    seen: set[int] = set()

    def number(at: int, length: int) -> int:
        if at + length > size:
            raise _cut(f"page {len(seen)} is not there")
        tif.filehandle.seek(at)
        return int.from_bytes(tif.filehandle.read(length), order)

    # The header of a classic TIFF has 8 bytes, that of a BigTIFF 16; the last ones are an offset.
    at = number(form.offsetsize if form.offsetsize == 8 else 4, form.offsetsize)
    while at and at not in seen:
        if at < 8:
            raise _cut(f"page {len(seen)} is not there")
        tags = number(at, form.tagnosize)
        seen.add(at)
        at = number(at + form.tagnosize + tags * form.tagsize, form.offsetsize)
    if len(tif.pages) < len(seen):
        raise _cut(f"{len(seen)} pages are declared, {len(tif.pages)} can be read")


def _cut(what: str) -> DecodeError:
    return DecodeError(f"is cut short: {what}", fix="Replace the file.")
