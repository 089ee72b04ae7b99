"""TIFF files -> one stack, by the series, axes, photometric and depth that they declare.

OME-TIFF, ImageJ's hyperstacks and Micro-Manager's stacks are read by their metadata. A file that is
incomplete, or one of a set, is refused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

import numpy as np

from dist_train.data.raw.open_frames import Frames, OnlyFile, holding
from dist_train.data.raw.stack import (
    ALPHA,
    GREY,
    RGB,
    Choices,
    Stack,
    chosen_depth,
    chosen_series,
)
from dist_train.data.raw.units import micrometres, names_of, regular_interval, seconds
from dist_train.errors import DecodeError
from dist_train.files import open_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tifffile import TiffFile, TiffPage, TiffPageSeries

SUFFIXES = (".tif", ".tiff")
PACKAGES = ("tifffile", "imagecodecs")

# Axes without a meaning: images, and what tifffile cannot name.
_UNNAMED = "IQ"
_PLAIN = "Save it as one stack of grey or RGB pictures, with the axes ZYX or TYX."
# Tags of sizes, colours, the places of the pixels, and descriptions.
_NEEDED = {254, *range(256, 260), 262, 266, 270, 273, 274, *range(277, 280), 284, 317, 320}
_NEEDED |= {*range(322, 326), 338, 339}
# Photometric interpretations and compressions (TIFF 6.0).
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_UNCOMPRESSED, _JPEGS = 1, (6, 7)

# tifffile's messages are judged here, and not shown.
_LOG = logging.getLogger("tifffile")
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the stack in a TIFF file, with its own values.

    Single pages make one stack. White-is-zero is inverted, a palette is applied, fewer than 8 bits
    are spread over 8, and pictures are turned upright.

    Raises:
        DecodeError: the file has several stacks, other axes than time, depth, channel, row and
            column, or unknown colours; it is one of a set; or pages or needed tags are missing.
    """
    from tifffile import TiffFile

    with ExitStack() as opened, _grave_messages():
        file = opened.enter_context(open_plain(path))
        # OME-TIFF refers to its pages by the file's name.
        name = PurePath(str(where)).name
        tif = opened.enter_context(TiffFile(OnlyFile(file), name=name, _multifile=False))
        # First of all: tifffile follows some damaged chains of pages without an end.
        _check_chain(tif)
        _check_alone(tif)
        series = tif.series
        if not series:
            raise DecodeError("holds no picture")
        if tif.is_ome and series[0].kind != "ome":
            raise DecodeError("its OME metadata do not fit its pages", fix=_PLAIN)
        number, chosen = _one_stack(series, choices)
        for one in chosen:
            _check_whole(tif, one)
        layouts = [_Layout.of(one, choices) for one in chosen]
        first = layouts[0]
        meta = _metadata(tif, number, first)
        spacing = meta.spacing
        if _orientation(first.page) >= 5:
            spacing = (spacing[0], spacing[2], spacing[1])
        signed = _is_signed(tif, first.page)
        return Stack(
            frames=holding(_frames(tif, layouts, signed), opened),
            dtype=np.dtype(np.int16) if signed else _dtype(first.page),
            count=sum(len(one.places) for one in layouts),
            channels=_channels(first, meta.channels),
            bits=_bits(tif, first.page, meta),
            spacing=spacing,
            interval=meta.interval,
        )


def _frames(tif: TiffFile, layouts: Sequence[_Layout], signed: bool) -> Frames:
    with _grave_messages():
        for layout in layouts:
            pictures = _Pictures(tif, layout)
            for places in layout.places:
                picture = [pictures.at(int(place)) for place in places]
                frame = picture[0] if len(picture) == 1 else np.stack(picture, axis=-1)
                frame = _upright(_positive(frame, layout.page), layout.page)
                yield (frame.astype(np.int32) - 32768).astype(np.int16) if signed else frame


@contextmanager
def _grave_messages() -> Iterator[None]:
    """Raise DecodeError at the end if tifffile told of something that it does not read as meant."""
    messages = _GraveMessages()
    _LOG.addHandler(messages)
    try:
        yield
    finally:
        _LOG.removeHandler(messages)
    if messages.last:
        raise DecodeError(
            f"cannot be read as it is meant ({messages.last})",
            fix="Replace the file, or save all of it anew as one stack.",
        )


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


def _one_stack(
    series: Sequence[TiffPageSeries], choices: Choices
) -> tuple[int, Sequence[TiffPageSeries]]:
    """Return the chosen series and its number, or all if they are single pictures of one kind."""
    alike = {
        (one.get_shape(squeeze=True), one.dtype, one.keyframe.photometric, one.get_axes(True))
        for one in series
    }
    if choices.series is None and len(alike) == 1 and all(_count(one) == 1 for one in series):
        return 0, series
    names = [
        f"{f'{one.name} ' if one.kind == 'ome' else ''}{one.axes} {list(one.shape)}"
        for one in series
    ]
    number = chosen_series(names, choices.series)
    return number, series[number : number + 1]


def _count(series: TiffPageSeries) -> int:
    """Number of pictures."""
    sizes = zip(series.axes, series.shape, strict=True)
    return int(math.prod(size for axis, size in sizes if axis not in "YXS"))


class _Layout:
    """Where the pictures of a clip are in a series.

    Attributes:
        places: [D, C] numbers of the pictures, each of ``shape`` with ``axes`` (YX, SYX or YXS).
        depth: T, Z, or None if the file does not say, or there is one frame.
        plane: position on the other of T and Z.
    """

    def __init__(
        self, series: TiffPageSeries, places: np.ndarray, axes: str, depth: str | None, plane: int
    ) -> None:
        self.series, self.places, self.axes = series, places, axes
        self.page: TiffPage = series.keyframe
        self.shape = tuple(series.shape[len(series.shape) - len(axes) :])
        self.depth, self.plane = depth, plane

    @classmethod
    def of(cls, series: TiffPageSeries, choices: Choices) -> _Layout:
        """Find the frames of a series by its axes.

        Raises:
            DecodeError: the series has axes that are not known, or a choice is missing.
        """
        kept = [
            (axis, size)
            for axis, size in zip(series.axes, series.shape, strict=True)
            if axis in "YX" or size > 1
        ]
        names = "".join(axis for axis, _ in kept)
        form = re.fullmatch("([^SYX]*)(S?YX|YXS)", names)
        if form is None or len({*names}) < len(names):
            raise DecodeError(
                f"has the axes {names} of {[size for _, size in kept]}, not frames, row and column",
                fix=_PLAIN,
            )
        axes = names[: len(form[1])]
        sizes = dict(kept[: len(axes)])
        frames = [axis for axis in axes if axis != "C"]
        known = {**sizes}
        if len(frames) == 1 and frames[0] in _UNNAMED:
            known["T"] = known.pop(frames[0])
        depth, plane = chosen_depth(known, choices)
        grid = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
        if len(frames) == 2:
            other = axes.index("Z" if depth == "T" else "T")
            grid = grid.take(plane, axis=other)
            axes = axes[:other] + axes[other + 1 :]
        if "C" in axes:
            grid = np.moveaxis(grid, axes.index("C"), -1)
        places = grid.reshape(-1, sizes.get("C", 1))
        if "T" in known and "T" not in sizes:
            depth = None
        return cls(series, places, names[len(form[1]) :], depth, plane)


class _Pictures:
    """Reads the pictures of a series, one at a time."""

    def __init__(self, tif: TiffFile, layout: _Layout) -> None:
        self.tif, self.layout, self.series = tif, layout, layout.series
        self.loaded: tuple[int, np.ndarray] | None = None

    def at(self, place: int) -> np.ndarray:
        """Return a picture as [H, W] or [H, W, S]."""
        shape = self.layout.shape
        size = math.prod(shape)
        if self.series.dataoffset is not None:
            dtype = np.dtype(f"{self.tif.byteorder}{self.layout.page.dtype.char}")
            at = self.series.dataoffset + place * size * dtype.itemsize
            values = self.tif.filehandle.read_array(dtype, size, at)
            picture = values.astype(dtype.newbyteorder("="), copy=False).reshape(shape)
        else:
            each = self.layout.page.size // size
            page = self.series.pages[place // each]
            if self.loaded is None or self.loaded[0] != place // each:
                self.loaded = place // each, page.asarray().reshape(each, *shape)
            picture = self.loaded[1][place % each]
        return picture if self.layout.axes != "SYX" else np.moveaxis(picture, 0, -1)


def _channels(layout: _Layout, names: Sequence[str | None]) -> tuple[str, ...]:
    """Names of the channels of the frames.

    Raises:
        DecodeError: the samples of the pixels are no known colour.
    """
    page, channels = layout.page, layout.places.shape[1]
    colours = getattr(page.photometric, "name", page.photometric)
    if page.photometric == _PALETTE:
        if page.colormap is None or channels > 1 or "S" in layout.axes:
            raise DecodeError("has no palette for its colours", fix=_PLAIN)
        return RGB
    if "S" not in layout.axes:
        # A picture of a single sample may be declared as RGB.
        if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
            raise DecodeError(f"its colours are {colours}", fix=_PLAIN)
        return GREY if channels == 1 else names_of(names, channels)
    samples = layout.shape[layout.axes.index("S")]
    # tifffile gives RGB for JPEG.
    is_rgb = page.photometric == _RGB or (page.photometric == _YCBCR and page.compression in _JPEGS)
    if channels == 1 and is_rgb and samples in (3, 4):
        return RGB if samples == 3 else (*RGB, ALPHA)
    if channels == 1 and page.photometric == _BLACK_IS_ZERO:
        return names_of(names, samples)
    raise DecodeError(
        f"has {samples} samples a pixel ({layout.series.axes}, {colours}), which are no RGB",
        fix=_PLAIN,
    )


def _dtype(page: TiffPage) -> np.dtype[Any]:
    if page.photometric == _PALETTE:
        return np.dtype(np.uint8)
    dtype: np.dtype[Any] = np.dtype(page.dtype).newbyteorder("=")
    return dtype


def _positive(picture: np.ndarray, page: TiffPage) -> np.ndarray:
    """Return the picture with black at 0, fewer than 8 bits spread, and a palette applied."""
    photometric = page.photometric
    if picture.dtype == np.uint8 and page.bitspersample < 8 and photometric != _PALETTE:
        most = (1 << page.bitspersample) - 1
        picture = np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)[picture]
    if photometric == _WHITE_IS_ZERO:
        if picture.dtype == np.bool_:
            return np.asarray(np.logical_not(picture))
        if picture.dtype.kind != "u":
            raise DecodeError(f"white is zero, in {picture.dtype} values", fix=_PLAIN)
        bits = max(8, int(page.bitspersample))
        return np.asarray((1 << bits) - 1 - picture, picture.dtype)
    if photometric == _PALETTE:
        palette = page.colormap
        # Its values have 16 bits. Some writers fill only 8, which libtiff also accepts.
        palette = (palette >> 8 if palette.max() > 255 else palette).astype(np.uint8)
        return np.asarray(palette.T[picture])
    return picture


def _orientation(page: TiffPage) -> int:
    return int(page.tags.valueof("Orientation", 1))


def _upright(picture: np.ndarray, page: TiffPage) -> np.ndarray:
    """Turn a picture upright (TIFF 6.0, Orientation)."""
    orientation = _orientation(page)
    if orientation in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return picture


@dataclass(frozen=True)
class _Metadata:
    """What the metadata of a program say of a stack; see ``Stack``."""

    channels: Sequence[str | None] = ()
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)
    interval: float | None = None
    bits: int | None = None


def _metadata(tif: TiffFile, number: int, layout: _Layout) -> _Metadata:
    if tif.is_ome:
        found = _of_ome(tif, number, layout)
    elif tif.is_imagej and tif.imagej_metadata:
        found = _of_imagej(tif.imagej_metadata, layout.page)
    elif tif.is_micromanager and tif.micromanager_metadata:
        found = _of_micro_manager(tif.micromanager_metadata.get("Summary") or {})
    else:
        return _Metadata()
    z, y, x = found.spacing
    return replace(
        found,
        spacing=(z if layout.depth != "T" else None, y, x),
        interval=found.interval if layout.depth != "Z" else None,
    )


def _of_ome(tif: TiffFile, number: int, layout: _Layout) -> _Metadata:
    """Read the OME-XML of one image (OME schema 2016-06)."""
    root = ElementTree.fromstring(tif.ome_metadata)
    images = [pixels for image in root.findall("{*}Image") for pixels in image.findall("{*}Pixels")]
    if len(images) != len(tif.series):
        return _Metadata()
    pixels = images[number]
    z, y, x = (
        micrometres(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "ZYX"
    )
    channels = [c.get("Name") or c.get("Fluor") for c in pixels.findall("{*}Channel")]
    stamps = {
        int(plane.get("TheT", 0)): _time_stamp(plane)
        for plane in pixels.findall("{*}Plane")
        if int(plane.get("TheC", 0)) == 0 and int(plane.get("TheZ", 0)) == layout.plane
    }
    times = [stamps.get(t) for t in range(len(layout.places))]
    known = [time for time in times if time is not None]
    if layout.depth == "T" and len(known) == len(times):
        interval = regular_interval(known)
    else:
        unit = pixels.get("TimeIncrementUnit", "s")
        interval = seconds(pixels.get("TimeIncrement"), unit)
    return _Metadata(channels, (z, y, x), interval)


def _time_stamp(plane: ElementTree.Element) -> float | None:
    """Time stamp of a plane in seconds, which may be 0 or less; None without one."""
    time, one = plane.get("DeltaT"), seconds(1, plane.get("DeltaTUnit", "s"))
    return None if time is None or one is None else float(time) * one


def _of_imagej(said: dict[str, Any], page: TiffPage) -> _Metadata:
    """Read ImageJ's description, as its ``ij.io.FileInfo`` and ``FileOpener`` have it."""
    unit = str(said.get("unit", ""))
    y, x = (_pixel_size(page.tags.valueof(f"{axis}Resolution"), unit) for axis in "YX")
    interval = seconds(said.get("finterval"), str(said.get("tunit", "s")))
    return _Metadata(spacing=(micrometres(said.get("spacing"), unit), y, x), interval=interval)


def _pixel_size(resolution: tuple[int, int] | None, unit: str) -> float | None:
    """Size of a pixel in µm, by the pixels a unit."""
    return (
        micrometres(resolution[1] / resolution[0], unit) if resolution and resolution[0] else None
    )


def _of_micro_manager(summary: dict[str, Any]) -> _Metadata:
    """Read the summary of a Micro-Manager stack."""
    size = micrometres(summary.get("PixelSize_um"), "µm")
    names, bits = summary.get("ChNames"), summary.get("BitDepth")
    return _Metadata(
        [str(name) for name in names] if isinstance(names, list) else [],
        (micrometres(summary.get("z-step_um"), "µm"), size, size),
        seconds(summary.get("Interval_ms"), "ms"),
        bits if isinstance(bits, int) else None,
    )


def _bits(tif: TiffFile, page: TiffPage, meta: _Metadata) -> int | None:
    """Depth of the values by the metadata, None if it is 8 or 16 bits."""
    declared = [page.bitspersample, meta.bits or 0]
    if tif.ome_metadata:
        declared += map(int, re.findall(r'\bSignificantBits="(\d{1,2})"', tif.ome_metadata))
    return max((bits for bits in declared if 8 < bits < 16), default=None)


def _is_signed(tif: TiffFile, page: TiffPage) -> bool:
    """Whether these are int16 values, which ImageJ stores as uint16, with a calibration."""
    said = tif.imagej_metadata or {}
    line = [said.get(name) for name in ("cf", "c0", "c1")]
    return page.dtype == np.uint16 and line == [0, -32768, 1]


def _check_alone(tif: TiffFile) -> None:
    if not tif.is_ome or not tif.ome_metadata:
        return
    text = tif.ome_metadata
    files = set(re.findall(r"<(?:\w+:)?UUID\b[^>]*>\s*([^<]*?)\s*</", text))
    if len(files) > 1 or re.search(r"<(?:\w+:)?BinaryOnly\b", text):
        names = sorted(
            {*re.findall(r'\b(?:FileName|MetadataFile)="([^"]*)"', text)} - {tif.filename}
        )
        others = f" with {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
        raise DecodeError(
            f"is one file of an OME set{others}, whose metadata are for all of them",
            fix="Save the whole set as one stack.",
        )


def _check_whole(tif: TiffFile, series: TiffPageSeries) -> None:
    """Raise DecodeError unless the file has all pixels that the series declares."""
    size, frames = tif.filehandle.size, _count(series)
    start, declared = series.dataoffset, _declared(tif, series)
    if start is not None and start + series.nbytes > size:
        held = max(0, size - start) // max(1, series.nbytes // max(1, frames))
        raise _cut(f"{frames} frames are declared, {held} are there")
    if declared > frames:
        raise _cut(f"{declared} frames are declared, {frames} are there")
    form, least = series.keyframe, 0
    if form.compression == _UNCOMPRESSED and form.bitspersample == 8 * form.dtype.itemsize:
        least = form.nbytes
    for number, page in enumerate(series.pages if start is None else ()):
        if page is None:
            raise _cut(f"{frames} frames are declared, page {number} is not there")
        ends = zip(page.dataoffsets, page.databytecounts, strict=True)
        if any(count == 0 or offset + count > size for offset, count in ends) or (
            sum(page.databytecounts) < least
        ):
            raise _cut(f"pixels of page {number} of {frames} are not there")


def _declared(tif: TiffFile, series: TiffPageSeries) -> int:
    """Number of frames by ImageJ's or tifffile's description, 0 without one."""
    if tif.is_imagej and tif.imagej_metadata:
        sizes = [tif.imagej_metadata.get(name, 1) for name in ("channels", "slices", "frames")]
        return max(int(tif.imagej_metadata.get("images", 1)), int(math.prod(sizes)))
    description = series.keyframe.shaped_description
    if description is None:
        return 0
    from tifffile.tifffile import shaped_description_metadata

    shape = shaped_description_metadata(description)["shape"]
    return int(_count(series) * math.prod(shape) // max(1, series.size))


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
