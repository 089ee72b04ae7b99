"""A decoded picture of any pixel format -> luma and chroma planes, uint8, without loss of grey."""

from __future__ import annotations

import re
from dataclasses import dataclass

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from dist_train.data.raw.grey import FULL_RANGE, levels, to_8_bits
from dist_train.data.types import Plane
from dist_train.errors import DecodeError

# Luma is plane 0 alone, or its first component; big-endian names end in "be".
_YUV = re.compile(r"yuv[aj]?4\d\dp(\d*)(le|be)?")
_GREY = re.compile(r"(?:gray|ya)(\d*)(le|be)?")
# Where R, G and B are among the bytes, or 16-bit words, of a pixel; and how many these are.
_PACKED = {
    "rgb24": (0, 1, 2, 3),
    "bgr24": (2, 1, 0, 3),
    "rgb0": (0, 1, 2, 4),
    "rgba": (0, 1, 2, 4),
    "bgr0": (2, 1, 0, 4),
    "bgra": (2, 1, 0, 4),
    "0rgb": (1, 2, 3, 4),
    "argb": (1, 2, 3, 4),
    "0bgr": (3, 2, 1, 4),
    "abgr": (3, 2, 1, 4),
    "rgb48": (0, 1, 2, 3),
    "bgr48": (2, 1, 0, 3),
    "rgba64": (0, 1, 2, 4),
    "bgra64": (2, 1, 0, 4),
}
_DEEP = re.compile(r"(gray16|ya16|gbra?p16|rgb48|bgr48|rgba64|bgra64)(le|be)")
Word = np.dtype[np.uint8] | np.dtype[np.uint16]
_BYTE = np.dtype(np.uint8)
_PLANAR_RGB = re.compile(r"gbra?p(\d*)(le|be)?")
_FLOAT = re.compile(r".*f(16|32)(le|be)")


@dataclass(frozen=True, slots=True)
class Frame:
    """One upright video frame, in planes that cannot be written to.

    They are the decoder's own, not copied, where the pixel format is 8-bit 4:2:0 and the picture
    need not be turned.

    ``y``: uint8 [H, W], luma as it is coded: 0 black and 255 white if ``full_range``, else 16 and
    235. ``cb``, ``cr``: uint8 [ceil(H/2), ceil(W/2)], 128 is grey. ``bt709``: the colour matrix is
    BT.709 rather than BT.601.
    """

    y: Plane
    cb: Plane
    cr: Plane
    full_range: bool
    bt709: bool

    @property
    def luma(self) -> Plane:
        """The whole frame's grey: uint8 [H, W], a copy, 0 black and 255 white."""
        return self.grey(slice(None), slice(None))

    def grey(self, rows: slice, columns: slice) -> Plane:
        """A part of ``luma``, at the cost of that part."""
        part = self.y[rows, columns]
        return part.copy() if self.full_range else np.asarray(cv2.LUT(part, FULL_RANGE))


def read_frame(
    frame: av.VideoFrame, converter: VideoReformatter, bits: int | None, where: object
) -> Frame:
    """The planes of a decoded picture.

    - 8-bit 4:2:0 is taken as it is.
    - Other YUV gives its own luma, and chroma at half the resolution by FFmpeg.
    - Grey is full range, as FFmpeg has it, whatever the file says of its range.
    - RGB becomes BT.601 luma and chroma of full range.
    - More than 8 bits become 8 by ``grey.levels``. Grey and RGB of 16 bits, in which values of
      any depth are kept, have as many bits as ``bits`` says.

    Raises:
        DecodeError: there are values of 16 bits, and ``bits`` is None or too few for them; or
            floating-point values, of which nobody says what is black and white.
    """
    name = frame.format.name
    if _FLOAT.fullmatch(name):
        raise DecodeError(
            f"holds floating-point values ({name})",
            where=where,
            fix="Encode it anew with integers, such as gray16le.",
        )
    if is_deep_format(name):
        channels = [to_8_bits(channel, bits, where) for channel in deep_channels(frame)]
        return _grey_frame(channels[0]) if len(channels) == 1 else _rgb_frame(np.dstack(channels))
    full_range = name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    if name in ("yuv420p", "yuvj420p"):
        y, cb, cr = (_plane(plane, plane.width) for plane in frame.planes[:3])
        return Frame(y, cb, cr, full_range, bt709=frame.colorspace == 1)
    if match := _GREY.fullmatch(name):
        step = 2 if name.startswith("ya") else 1
        y = _plane(frame.planes[0], step * frame.width, _word(match))[:, ::step]
        if y.dtype != np.uint8:
            y = levels(int(match[1]), full_range=True)[y]
        return _grey_frame(y)
    if frame.format.is_rgb or frame.format.has_palette:
        return _rgb_frame(_rgb(frame, converter))
    if name in ("monob", "monow"):
        grey = _reformatted(frame, converter, "gray", ColorRange.JPEG)
        return _grey_frame(_plane(grey.planes[0], grey.width))
    ranges = ColorRange.JPEG if full_range else ColorRange.MPEG
    match = _YUV.fullmatch(name)
    if match is None and frame.format.components[0].bits > 8:
        # Packed, such as v30xle.
        frame = _reformatted(frame, converter, "yuv444p16le", ColorRange.UNSPECIFIED)
        match = _YUV.fullmatch("yuv444p16le")
    if match and match[1]:
        # In 8 bits, limited range has no room for all levels.
        y = _plane(frame.planes[0], frame.width, _word(match))
        y = levels(int(match[1]), full_range=full_range)[y]
        y.flags.writeable = False
        _, cb, cr = _as_420(frame, converter, ColorRange.JPEG)
        return Frame(y, cb, cr, True, bt709=frame.colorspace == 1)
    y, cb, cr = _as_420(frame, converter, ranges)
    if match:
        y = _plane(frame.planes[0], frame.width)
    return Frame(y, cb, cr, full_range, bt709=frame.colorspace == 1)


def _word(match: re.Match[str]) -> Word:
    if match[1] in ("", "8"):
        return _BYTE
    return np.dtype(">u2" if match[2] == "be" else "<u2")


def _plane(
    plane: av.video.plane.VideoPlane,
    width: int,
    dtype: Word = _BYTE,
) -> np.ndarray:
    """``width`` values of each row, which cannot be written to."""
    # The array holds the plane, which holds the decoder's buffer.
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, abs(plane.line_size))
    if plane.line_size < 0:
        # The rows lie from the last to the first, as in AVI without compression.
        rows = rows[::-1].copy()
    rows.flags.writeable = False
    return rows[:, : width * dtype.itemsize].view(dtype)


def _reformatted(
    frame: av.VideoFrame, converter: VideoReformatter, format: str, to_range: ColorRange
) -> av.VideoFrame:
    return converter.reformat(
        frame,
        format=format,
        src_color_range=frame.color_range or None,
        dst_color_range=to_range or frame.color_range or None,
        # By default it starts a thread for each of the machine's cores, frame by frame.
        threads=1,
    )


def _as_420(
    frame: av.VideoFrame, converter: VideoReformatter, to_range: ColorRange
) -> tuple[Plane, Plane, Plane]:
    converted = _reformatted(frame, converter, "yuv420p", to_range)
    y, cb, cr = (_plane(plane, plane.width) for plane in converted.planes[:3])
    return y, cb, cr


def _rgb(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """uint8 [H, W, 3]."""
    name = frame.format.name
    if match := _PLANAR_RGB.fullmatch(name):
        channels = _planar_rgb(frame, _word(match))
        if match[1]:
            channels = [levels(int(match[1]), full_range=True)[channel] for channel in channels]
        return np.dstack(channels)
    if name not in _PACKED:
        frame, name = _reformatted(frame, converter, "rgb24", ColorRange.UNSPECIFIED), "rgb24"
    return np.dstack(_packed_rgb(frame, name, _BYTE))


def _planar_rgb(frame: av.VideoFrame, dtype: Word) -> list[np.ndarray]:
    green, blue, red = (_plane(plane, frame.width, dtype) for plane in frame.planes[:3])
    return [red, green, blue]


def _packed_rgb(frame: av.VideoFrame, layout: str, dtype: Word) -> list[np.ndarray]:
    *order, size = _PACKED[layout]
    values = _plane(frame.planes[0], size * frame.width, dtype)
    return [values[:, channel::size] for channel in order]


def is_deep_format(name: str) -> bool:
    """Whether a pixel format keeps values of any depth in 16 bits."""
    return _DEEP.fullmatch(name) is not None


def deep_channels(frame: av.VideoFrame) -> list[np.ndarray]:
    """Grey, or R, G and B, of a format that ``is_deep_format``: each uint16 [H, W]."""
    match = _DEEP.fullmatch(frame.format.name)
    assert match is not None
    dtype = np.dtype(">u2" if match[2] == "be" else "<u2")
    if match[1].startswith("gbr"):
        return _planar_rgb(frame, dtype)
    if match[1] in _PACKED:
        return _packed_rgb(frame, match[1], dtype)
    step = 2 if match[1].startswith("ya") else 1
    return [_plane(frame.planes[0], step * frame.width, dtype)[:, ::step]]


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
    y.flags.writeable = False
    height, width = y.shape
    chroma = np.full((-(-height // 2), -(-width // 2)), 128, np.uint8)
    chroma.flags.writeable = False
    return Frame(y, chroma, chroma, full_range=True, bt709=False)
