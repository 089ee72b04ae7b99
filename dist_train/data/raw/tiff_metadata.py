"""What OME, ImageJ and Micro-Manager say of a TIFF stack."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from dist_train.data.raw.units import micrometres, regular_interval, seconds

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage


@dataclass(frozen=True)
class Metadata:
    """What the metadata of a program say of a stack; see ``Stack``."""

    channels: Sequence[str | None] = ()
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)
    interval: float | None = None
    bits: int | None = None


def metadata_of(
    tif: TiffFile, number: int, page: TiffPage, depth: str | None, plane: int, frames: int
) -> Metadata:
    """Return what is said of a stack.

    Args:
        number: of the series in the file, whose first page is ``page``.
        depth: axis of the ``frames``, T, Z, or None if the file does not say.
        plane: position on the other one.
    """
    if tif.is_ome:
        found = _of_ome(tif, number, depth, plane, frames)
    elif tif.is_imagej and tif.imagej_metadata:
        found = _of_imagej(tif.imagej_metadata, page)
    elif tif.is_micromanager and tif.micromanager_metadata:
        found = _of_micro_manager(tif.micromanager_metadata.get("Summary") or {})
    else:
        return Metadata()
    z, y, x = found.spacing
    return replace(
        found,
        spacing=(z if depth != "T" else None, y, x),
        interval=found.interval if depth != "Z" else None,
    )


def _of_ome(tif: TiffFile, number: int, depth: str | None, plane: int, frames: int) -> Metadata:
    """Read the OME-XML of one image (OME schema 2016-06)."""
    images = _images(tif)
    if len(images) != len(tif.series):
        return Metadata()
    pixels = images[number]
    z, y, x = (
        micrometres(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "ZYX"
    )
    channels = [c.get("Name") or c.get("Fluor") for c in pixels.findall("{*}Channel")]
    stamps = {
        int(one.get("TheT", 0)): _time_stamp(one)
        for one in pixels.findall("{*}Plane")
        if int(one.get("TheC", 0)) == 0 and int(one.get("TheZ", 0)) == plane
    }
    times = [stamps.get(t) for t in range(frames)]
    known = [time for time in times if time is not None]
    if depth == "T" and len(known) == len(times):
        interval = regular_interval(known)
    else:
        unit = pixels.get("TimeIncrementUnit", "s")
        interval = seconds(pixels.get("TimeIncrement"), unit)
    return Metadata(channels, (z, y, x), interval)


def _images(tif: TiffFile) -> list[ElementTree.Element]:
    """The pixels of all images."""
    root = ElementTree.fromstring(tif.ome_metadata)
    return [pixels for image in root.findall("{*}Image") for pixels in image.findall("{*}Pixels")]


def _time_stamp(plane: ElementTree.Element) -> float | None:
    """Time stamp of a plane in seconds, which may be 0 or less; None without one."""
    time, one = plane.get("DeltaT"), seconds(1, plane.get("DeltaTUnit", "s"))
    return None if time is None or one is None else float(time) * one


def _of_imagej(said: dict[str, Any], page: TiffPage) -> Metadata:
    """Read ImageJ's description, as its ``ij.io.FileInfo`` and ``FileOpener`` have it."""
    unit = str(said.get("unit", ""))
    y, x = (_pixel_size(page.tags.valueof(f"{axis}Resolution"), unit) for axis in "YX")
    interval = seconds(said.get("finterval"), str(said.get("tunit", "s")))
    return Metadata(spacing=(micrometres(said.get("spacing"), unit), y, x), interval=interval)


def _pixel_size(resolution: tuple[int, int] | None, unit: str) -> float | None:
    """Size of a pixel in µm, by the pixels a unit."""
    return (
        micrometres(resolution[1] / resolution[0], unit) if resolution and resolution[0] else None
    )


def _of_micro_manager(summary: dict[str, Any]) -> Metadata:
    """Read the summary of a Micro-Manager stack."""
    size = micrometres(summary.get("PixelSize_um"), "µm")
    names, bits = summary.get("ChNames"), summary.get("BitDepth")
    return Metadata(
        [str(name) for name in names] if isinstance(names, list) else [],
        (micrometres(summary.get("z-step_um"), "µm"), size, size),
        seconds(summary.get("Interval_ms"), "ms"),
        bits if isinstance(bits, int) else None,
    )


def bits_of(tif: TiffFile, page: TiffPage, meta: Metadata, chosen: slice) -> int | None:
    """Depth of the values of the chosen series by the metadata, None if it is 8 or 16 bits."""
    declared = [page.bitspersample, meta.bits or 0]
    if tif.ome_metadata:
        images = _images(tif)
        # Otherwise it is not known which image is which series.
        images = images[chosen] if len(images) == len(tif.series) else images
        said = (pixels.get("SignificantBits", "") for pixels in images)
        declared += [int(bits) for bits in said if re.fullmatch(r"[0-9]{1,2}", bits)]
    return max((bits for bits in declared if 8 < bits < 16), default=None)
