"""Chunks of PNG and WebP files: whether all are there and sound, and how long frames are shown."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import IO

from dist_train.data.raw.damage import MOST_PACKED
from dist_train.errors import DecodeError

PNG = b"\x89PNG\r\n\x1a\n"
GREY_TYPES = (0, 4)
# Samples of a pixel by the colour type (PNG, 11.2.1).
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PIECE = 1 << 20
_OF_WEBP = {b"VP8X", b"VP8 ", b"VP8L", b"ANIM", b"ANMF", b"ALPH", b"ICCP", b"EXIF", b"XMP "}


@dataclass(frozen=True)
class PngChunks:
    """What the chunks of a PNG file say.

    Attributes:
        bits: of a sample.
        colour: type of colour; ``GREY_TYPES`` are grey.
        seconds: how long each frame of an animation is shown, empty for a single picture.
        has_cover: whether the picture that plain readers show is no frame of the animation.
    """

    bits: int
    colour: int
    seconds: tuple[float, ...]
    has_cover: bool


def png_chunks(file: IO[bytes]) -> PngChunks:
    """Check a PNG file, and return what its chunks say (PNG third edition, chapters 5 and 11).

    Raises:
        DecodeError: it is cut short, a checksum is wrong, or it is too small for its picture.
    """
    size = file.seek(0, os.SEEK_END)
    place, kind = len(PNG), b""
    header, seconds = b"", []
    declared, has_cover, has_data = 0, False, False
    while kind != b"IEND":
        file.seek(place)
        start = file.read(8)
        if len(start) < 8:
            raise DecodeError("is cut short")
        length, kind = struct.unpack(">I4s", start)
        if place + 12 + length > size:
            raise DecodeError("is cut short")
        content, crc = b"", zlib.crc32(kind)
        for at in range(0, length, _PIECE):
            piece = file.read(min(_PIECE, length - at))
            content, crc = content or piece, zlib.crc32(piece, crc)
        if file.read(4) != crc.to_bytes(4):
            raise DecodeError("is damaged: a checksum is wrong")
        if kind == b"IHDR":
            header = content
        elif kind == b"acTL":
            (declared,) = struct.unpack_from(">I", content)
        elif kind == b"fcTL":
            part, whole = struct.unpack_from(">HH", content, 20)
            # A denominator of 0 means 100.
            seconds.append(part / (whole or 100))
        elif kind == b"IDAT" and not has_data:
            has_data, has_cover = True, declared > 0 and not seconds
        place += 12 + length
    width, height, bits, colour = struct.unpack_from(">IIBB", header)
    if width * height * _SAMPLES.get(colour, 4) * bits // 8 > MOST_PACKED * size:
        raise DecodeError(f"is too small for its declared {width} x {height} pixels")
    if declared != len(seconds):
        raise DecodeError(f"holds {len(seconds)} of {declared} declared frames")
    return PngChunks(bits, colour, tuple(seconds), has_cover)


def webp_seconds(file: IO[bytes]) -> tuple[float, ...]:
    """Return how long each frame of a WebP file is shown, nothing for a single picture (RFC 9649).

    Raises:
        DecodeError: the file is cut short, or has a chunk that WebP does not know: it may be a
            damaged frame.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    (declared,) = struct.unpack("<4xI4x", file.read(12))
    end = declared + 8
    seconds, place = [], 12
    while place + 8 <= end <= size:
        file.seek(place)
        kind, length = struct.unpack("<4sI", file.read(8))
        if place + 8 + length > end:
            break
        if kind not in _OF_WEBP:
            raise DecodeError("is damaged: a chunk is of no known kind")
        if kind == b"ANMF":
            seconds.append(int.from_bytes(file.read(16)[12:15], "little") / 1000)
        # Chunks have an even size.
        place += 8 + length + length % 2
    if place < end or end > size:
        raise DecodeError("is cut short")
    return tuple(seconds)
