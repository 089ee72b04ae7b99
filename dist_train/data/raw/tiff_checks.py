"""Whether a TIFF file is all there, and read as it is meant."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from dist_train.errors import DecodeError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

# Tags of sizes, colours, the places of the pixels, and descriptions.
_NEEDED = {254, *range(256, 260), 262, 266, 270, 273, 274, *range(277, 280), 284, 317, 320}
_NEEDED |= {*range(322, 326), 338, 339}
# Compression (TIFF 6.0).
_UNCOMPRESSED = 1

# tifffile's messages are judged here, and not shown.
_LOG = logging.getLogger("tifffile")
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())


@contextmanager
def grave_messages() -> Iterator[None]:
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


def count_of(series: TiffPageSeries) -> int:
    """Number of pictures."""
    sizes = zip(series.axes, series.shape, strict=True)
    return int(math.prod(size for axis, size in sizes if axis not in "YXS"))


def check_alone(tif: TiffFile) -> None:
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


def check_whole(tif: TiffFile, series: TiffPageSeries) -> None:
    """Raise DecodeError unless the file has all pixels that the series declares."""
    size, frames = tif.filehandle.size, count_of(series)
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
    return int(count_of(series) * math.prod(shape) // max(1, series.size))


def check_chain(tif: TiffFile) -> None:
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
