"""A decoded picture of any pixel format -> grey of 16 bits, or RGB, full range."""

from __future__ import annotations

from functools import cache
from typing import Literal

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from dist_train.data.raw.frame import (
    YUV,
    Frame,
    deep_luma,
    is_full_range,
    is_full_values,
    plane_of,
    reformatted,
    scaled,
    unpacked,
)
from dist_train.data.raw.grey import levels_16
from dist_train.data.raw.stack import LUMA
from dist_train.errors import DecodeError

#: What a video's frames become: grey or RGB, of 8 or 16 bits.
Pixels = Literal["grey", "grey16", "rgb", "rgb16"]

# Weights of red and blue in luma, by the number of the matrix in ISO/IEC 23001-8. Without a number,
# BT.601 holds.
_BT601 = (0.299, 0.114)
_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
} | dict.fromkeys((2, 3, 5, 6), _BT601)


def stored_picture(
    frame: av.VideoFrame,
    coded: Frame,
    converter: VideoReformatter,
    bits: int | None,
    pixels: Pixels,
) -> np.ndarray | None:
    """Return uint16 [H, W], or uint8 or uint16 [H, W, 3], read-only; None for 8-bit grey.

    0 is black, 255 or 65535 is white. Grey is luma, as in ``read_frame``, with all its levels. RGB
    of YUV follows the matrix and the range that the file names.

    Args:
        coded: the planes of the picture.
        bits: bits in use in 16-bit values of grey and RGB.

    Raises:
        DecodeError: see ``checked_bits``; or the matrix is not known.
    """
    if pixels == "grey":
        return None
    deep = pixels.endswith("16")
    if is_full_values(frame):
        picture = scaled(unpacked(frame, converter), frame.format.name, bits, deep=deep)
        if pixels.startswith("rgb") and picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        elif pixels == "grey16" and picture.ndim == 3:
            picture = np.rint(picture @ np.array(LUMA, np.float32)).astype(np.uint16)
    else:
        picture = (
            _rgb(frame, converter, deep) if pixels != "grey16" else _luma(frame, coded, converter)
        )
    picture.flags.writeable = False
    return picture


def _luma(frame: av.VideoFrame, coded: Frame, converter: VideoReformatter) -> np.ndarray:
    """The luma of a YUV picture, uint16."""
    full_range = is_full_range(frame)
    if frame.format.components[0].bits <= 8:
        return np.asarray(levels_16(8, full_range=full_range)[coded.y])
    match = YUV.fullmatch(frame.format.name)
    if match is None:
        frame = reformatted(frame, converter, "yuv444p16le", ColorRange.UNSPECIFIED)
        match = YUV.fullmatch("yuv444p16le")
    assert match is not None
    return np.asarray(levels_16(int(match[1]), full_range=full_range)[deep_luma(frame, match)])


def _rgb(frame: av.VideoFrame, converter: VideoReformatter, deep: bool) -> np.ndarray:
    """The RGB of a YUV picture, uint8 or uint16.

    FFmpeg brings chroma to the size of luma. Its own conversion wraps around at colours beyond RGB.
    """
    if frame.colorspace not in _WEIGHTS:
        raise DecodeError(
            f"its colours are coded by matrix {frame.colorspace}, which is not read",
            fix="Prepare it with --channels grey, or encode it anew in RGB.",
        )
    bits, full_range = frame.format.components[0].bits, is_full_range(frame)
    kind, dtype = ("yuv444p", "u1") if bits <= 8 else (f"yuv444p{bits}le", "<u2")
    same = ColorRange.JPEG if full_range else ColorRange.MPEG
    if frame.format.name != kind:
        frame = converter.reformat(
            frame, format=kind, src_color_range=same, dst_color_range=same, threads=1
        )
    planes = [plane_of(plane, frame.width, np.dtype(dtype)) for plane in frame.planes[:3]]
    yuv = cv2.merge([plane.astype(np.float32) for plane in planes])
    white = 65535 if deep else 255
    rgb = cv2.transform(yuv, _matrix(frame.colorspace, bits, full_range=full_range) * white)
    return np.asarray(np.clip(np.rint(rgb), 0, white), np.uint16 if deep else np.uint8)


@cache
def _matrix(colorspace: int, bits: int, *, full_range: bool) -> np.ndarray:
    """From coded luma, Cb, Cr and 1 to R, G, B of 0 to 1 (ITU-R BT.601): float64 [3, 4]."""
    red, blue = _WEIGHTS[colorspace]
    green = 1 - red - blue
    to_rgb = np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )
    unit = 1 << (bits - 8)
    black = np.array([0 if full_range else 16, 128, 128]) * unit
    highest = (1 << bits) - 1
    span = np.array([highest] * 3 if full_range else [219 * unit, 224 * unit, 224 * unit])
    scaled_up = to_rgb / span
    return np.column_stack([scaled_up, -scaled_up @ black])
