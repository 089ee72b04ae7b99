"""A decoded picture of any pixel format -> luma and chroma planes, uint8, without loss of grey."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from dist_train.data.raw.grey import FULL_RANGE, checked_bits, levels, levels_16, to_8_bits
from dist_train.data.types import Plane
from dist_train.errors import DecodeError

# Formats with luma in plane 0, their number of bits and byte order.
YUV = re.compile(r"yuv[aj]?4\d\dp(\d*)(le|be)?")
GREY = re.compile(r"(gray|ya)\d*(le|be)?|mono[bw]")
# Formats whose values of any depth are kept in 16 bits.
_ANY_DEPTH = re.compile(r"(gray16|ya16|gbra?p16|rgb48|bgr48|rgba64|bgra64)(le|be)")
_PLANAR_RGB = re.compile(r"gbra?p\d+(le|be)")
_BYTE = np.dtype(np.uint8)
_FLOAT = re.compile(r".*f(16|32)(le|be)")


@dataclass(frozen=True, slots=True)
class Frame:
    """One upright video frame, in read-only planes.

    The planes are the decoder's own memory if the pixel format is 8-bit 4:2:0 and the picture is
    not turned.

    Attributes:
        y: uint8 [H, W], luma as it is coded: black is 0 and white 255 if ``full_range``, else 16
            and 235.
        cb, cr: uint8 [ceil(H/2), ceil(W/2)]; 128 is grey.
        bt709: the colour matrix is BT.709, else BT.601.
        wanted: the picture to store if it is not 8-bit grey: uint16 [H, W], or uint8 or uint16
            [H, W, 3], full range.
    """

    y: Plane
    cb: Plane
    cr: Plane
    full_range: bool
    bt709: bool
    wanted: np.ndarray | None = None

    @property
    def luma(self) -> Plane:
        """The frame's grey: uint8 [H, W], a copy, 0 black and 255 white."""
        return self.grey(slice(None), slice(None))

    def grey(self, rows: slice, columns: slice) -> Plane:
        """A part of ``luma``; only that part is computed."""
        part = self.y[rows, columns]
        return part.copy() if self.full_range else np.asarray(cv2.LUT(part, FULL_RANGE))

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """A part of the picture to store, a copy."""
        if self.wanted is None:
            return self.grey(rows, columns)
        return self.wanted[rows, columns].copy()


def read_frame(frame: av.VideoFrame, converter: VideoReformatter, bits: int | None) -> Frame:
    """Return the planes of a decoded picture.

    - 8-bit 4:2:0 is taken as it is.
    - Other YUV gives its own luma, and chroma at half the resolution by FFmpeg.
    - Grey is full range, as in FFmpeg, whatever range the file names.
    - RGB becomes BT.601 luma and chroma of full range.
    - Values of more than 8 bits become 8 by ``grey.levels``. Grey and RGB of 16 bits hold values of
      ``bits`` bits.

    Raises:
        DecodeError: the values are floating-point numbers, whose black and white are not known; or
            they have 16 bits, and ``bits`` is None or too few.
    """
    name = frame.format.name
    if _FLOAT.fullmatch(name):
        raise DecodeError(
            f"holds floating-point values ({name})",
            fix="Encode it anew with integers, such as gray16le.",
        )
    if is_full_values(frame):
        values = scaled(unpacked(frame, converter), name, bits)
        return _grey_frame(values) if values.ndim == 2 else _rgb_frame(values)
    full_range = is_full_range(frame)
    bt709 = frame.colorspace == 1
    if name in ("yuv420p", "yuvj420p"):
        y, cb, cr = (plane_of(plane, plane.width) for plane in frame.planes[:3])
        return Frame(y, cb, cr, full_range, bt709)
    match = YUV.fullmatch(name)
    if match is None and frame.format.components[0].bits > 8:
        # Packed, such as v30xle.
        frame = reformatted(frame, converter, "yuv444p16le", ColorRange.UNSPECIFIED)
        match = YUV.fullmatch("yuv444p16le")
    if match and match[1]:
        # In 8 bits, limited range has no room for all levels.
        y = levels(int(match[1]), full_range=full_range)[deep_luma(frame, match)]
        y.flags.writeable = False
        _, cb, cr = _as_420(frame, converter, ColorRange.JPEG)
        return Frame(y, cb, cr, True, bt709)
    y, cb, cr = _as_420(frame, converter, ColorRange.JPEG if full_range else ColorRange.MPEG)
    if match:
        y = plane_of(frame.planes[0], frame.width)
    return Frame(y, cb, cr, full_range, bt709)


def is_full_values(frame: av.VideoFrame) -> bool:
    """Whether a picture is grey, RGB or a palette, which have full range in FFmpeg."""
    form = frame.format
    return GREY.fullmatch(form.name) is not None or form.is_rgb or form.has_palette


def is_full_range(frame: av.VideoFrame) -> bool:
    """Whether the luma of a YUV picture is 0 for black and the highest value for white."""
    return bool(frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG)


def deep_luma(frame: av.VideoFrame, match: re.Match[str]) -> np.ndarray:
    """The coded luma of a picture whose format matches ``YUV``, of more than 8 bits."""
    dtype = np.dtype(">u2" if match[2] == "be" else "<u2")
    return plane_of(frame.planes[0], frame.width, dtype)


def scaled(values: np.ndarray, name: str, bits: int | None, *, deep: bool = False) -> np.ndarray:
    """Bring the values of ``unpacked`` to uint8, or with ``deep`` to uint16; the highest is white.

    Args:
        name: of the pixel format.
        bits: bits in use in 16-bit values.

    Raises:
        DecodeError: see ``checked_bits``.
    """
    if has_any_depth(name):
        if deep:
            return np.asarray(levels_16(checked_bits(values, bits), full_range=True)[values])
        return to_8_bits(values, bits)
    if values.dtype == np.uint8:
        return np.asarray(levels_16(8, full_range=True)[values]) if deep else values
    # FFmpeg fills the lower bits.
    return values if deep else np.asarray(values >> 8, np.uint8)


def has_any_depth(name: str) -> bool:
    """Whether a pixel format keeps values of any depth in 16 bits."""
    return _ANY_DEPTH.fullmatch(name) is not None


def unpacked(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """Return a grey picture [H, W], or RGB [H, W, 3], without loss: uint8 or uint16.

    Values of 9 to 14 bits are moved to the highest of 16 bits.
    """
    name = frame.format.name
    if GREY.fullmatch(name):
        is_deep, samples = frame.format.components[0].bits > 8, 1
        format = "gray16le" if is_deep else "gray"
    else:
        is_deep, samples = bool(has_any_depth(name) or _PLANAR_RGB.fullmatch(name)), 3
        format = "rgb48le" if is_deep else "rgb24"
    converted = reformatted(frame, converter, format, ColorRange.UNSPECIFIED)
    dtype = np.dtype("<u2") if is_deep else _BYTE
    values = plane_of(converted.planes[0], samples * frame.width, dtype)
    return values if samples == 1 else values.reshape(frame.height, frame.width, 3)


def plane_of(
    plane: av.video.plane.VideoPlane, width: int, dtype: np.dtype[Any] = _BYTE
) -> np.ndarray:
    """``width`` values of each row, read-only."""
    # The array refers to the plane, which keeps the decoder's buffer alive.
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, abs(plane.line_size))
    if plane.line_size < 0:
        # The last row comes first, as in AVI without compression.
        rows = rows[::-1].copy()
    rows.flags.writeable = False
    return rows[:, : width * dtype.itemsize].view(dtype)


def reformatted(
    frame: av.VideoFrame, converter: VideoReformatter, format: str, to_range: ColorRange
) -> av.VideoFrame:
    return converter.reformat(
        frame,
        format=format,
        src_color_range=frame.color_range or None,
        dst_color_range=to_range or frame.color_range or None,
        # By default it starts a thread per core for each frame.
        threads=1,
    )


def _as_420(
    frame: av.VideoFrame, converter: VideoReformatter, to_range: ColorRange
) -> tuple[Plane, Plane, Plane]:
    converted = reformatted(frame, converter, "yuv420p", to_range)
    y, cb, cr = (plane_of(plane, plane.width) for plane in converted.planes[:3])
    return y, cb, cr


def _rgb_frame(rgb: np.ndarray) -> Frame:
    y, cr, cb = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb))
    height, width = y.shape
    half = -(-width // 2), -(-height // 2)
    if height % 2 or width % 2:
        # The last blocks of an odd size have fewer pixels.
        cb, cr = (
            cv2.copyMakeBorder(plane, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
            for plane in (cb, cr)
        )
    cb, cr = (cv2.resize(plane, half, interpolation=cv2.INTER_AREA) for plane in (cb, cr))
    for plane in (y, cb, cr):
        plane.flags.writeable = False
    return Frame(y, cb, cr, full_range=True, bt709=False)


def _grey_frame(y: Plane) -> Frame:
    y = np.ascontiguousarray(y)
    height, width = y.shape
    chroma = np.full((-(-height // 2), -(-width // 2)), 128, np.uint8)
    for plane in (y, chroma):
        plane.flags.writeable = False
    return Frame(y, chroma, chroma, full_range=True, bt709=False)
