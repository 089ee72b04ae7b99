"""TIFF files -> one stack, by the series, axes, photometric and depth that they declare.

OME-TIFF, ImageJ's hyperstacks and Micro-Manager's stacks are read by their metadata. A file that is
incomplete, or one of a set, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

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
from dist_train.data.raw.tiff_checks import (
    check_alone,
    check_chain,
    check_whole,
    count_of,
    grave_messages,
)
from dist_train.data.raw.tiff_metadata import bits_of, metadata_of
from dist_train.data.raw.units import names_of
from dist_train.errors import DecodeError
from dist_train.files import open_plain

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

SUFFIXES = (".tif", ".tiff")
PACKAGES = ("tifffile", "imagecodecs")

# Axes without a meaning: images, and what tifffile cannot name.
_UNNAMED = "IQ"
_PLAIN = "Save it as one stack of grey or RGB pictures, with the axes ZYX or TYX."
# Photometric interpretations and compressions (TIFF 6.0).
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_JPEGS = (6, 7)


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the stack in a TIFF file, with its own values.

    Single pages make one stack. White-is-zero is inverted, a palette is applied, fewer than 8 bits
    are spread over 8, and pictures are turned upright.

    Raises:
        DecodeError: the file has several stacks, other axes than time, depth, channel, row and
            column, or unknown colours; it is one of a set; or pages or needed tags are missing.
    """
    from tifffile import TiffFile

    with ExitStack() as opened, grave_messages():
        file = opened.enter_context(open_plain(path))
        # OME-TIFF refers to its pages by the file's name.
        name = PurePath(str(where)).name
        tif = opened.enter_context(TiffFile(OnlyFile(file), name=name, _multifile=False))
        # First of all: tifffile follows some damaged chains of pages without an end.
        check_chain(tif)
        check_alone(tif)
        series = tif.series
        if not series:
            raise DecodeError("holds no picture")
        if tif.is_ome and series[0].kind != "ome":
            raise DecodeError("its OME metadata do not fit its pages", fix=_PLAIN)
        number, chosen = _one_stack(series, choices)
        for one in chosen:
            check_whole(tif, one)
        layouts = [_Layout.of(one, choices) for one in chosen]
        first = layouts[0]
        frames = sum(len(one.places) for one in layouts)
        meta = metadata_of(tif, number, first.page, first.depth, first.plane, frames)
        spacing = meta.spacing
        if _orientation(first.page) >= 5:
            spacing = (spacing[0], spacing[2], spacing[1])
        signed = _is_signed(tif, first.page)
        return Stack(
            frames=holding(_frames(tif, layouts, signed), opened),
            dtype=np.dtype(np.int16) if signed else _dtype(first.page),
            count=frames,
            channels=_channels(first, meta.channels),
            bits=bits_of(tif, first.page, meta, slice(number, number + len(chosen))),
            spacing=spacing,
            interval=meta.interval,
        )


def _frames(tif: TiffFile, layouts: Sequence[_Layout], signed: bool) -> Frames:
    with grave_messages():
        for layout in layouts:
            pictures = _Pictures(tif, layout)
            for places in layout.places:
                picture = [pictures.at(int(place)) for place in places]
                frame = picture[0] if len(picture) == 1 else np.stack(picture, axis=-1)
                frame = _upright(_positive(frame, layout.page), layout.page)
                yield (frame.astype(np.int32) - 32768).astype(np.int16) if signed else frame


def _one_stack(
    series: Sequence[TiffPageSeries], choices: Choices
) -> tuple[int, Sequence[TiffPageSeries]]:
    """Return the chosen series and its number, or all if they are single pictures of one kind."""
    alike = {
        (one.get_shape(squeeze=True), one.dtype, one.keyframe.photometric, one.get_axes(True))
        for one in series
    }
    if choices.series is None and len(alike) == 1 and all(count_of(one) == 1 for one in series):
        return 0, series
    names = [
        f"{f'{one.name} ' if one.kind == 'ome' else ''}{one.axes} {list(one.shape)}"
        for one in series
    ]
    number = chosen_series(names, choices.series)
    return number, series[number : number + 1]


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


def _is_signed(tif: TiffFile, page: TiffPage) -> bool:
    """Whether these are int16 values, which ImageJ stores as uint16, with a calibration."""
    said = tif.imagej_metadata or {}
    line = [said.get(name) for name in ("cf", "c0", "c1")]
    return page.dtype == np.uint16 and line == [0, -32768, 1]
