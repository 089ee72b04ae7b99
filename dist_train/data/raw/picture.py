"""One picture file -> its values: PNG, JPEG, BMP and WebP by Pillow, TIFF, PGM and PPM."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from dist_train.data.raw.chunks import PNG, PngChunks, png_chunks
from dist_train.data.raw.damage import reading
from dist_train.data.raw.stack import GREY, RGB, Choices
from dist_train.errors import DecodeError
from dist_train.files import open_plain

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp"),
    *(".tif", ".tiff", ".pgm", ".ppm", ".pnm"),
)
PACKAGES = ("pillow",)
# Files that systems, cameras and programs put beside those of a clip.
LITTER = ("thumbs.db", "desktop.ini", "dicomdir")
_TEXTS = (".txt", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".log", ".ini", ".xmp")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Kind, width, height and highest value; one white space comes before the values (netpbm).
_PNM = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
_ORIENTATION = 274


@dataclass(frozen=True)
class Picture:
    """A picture, [H, W] or [H, W, 3], with the values of its file; see ``Stack``."""

    values: np.ndarray
    channels: tuple[str, ...]
    bits: int | None = None
    window: tuple[float, float] | None = None


def is_picture(name: str) -> bool:
    """Whether a file of this name may be a picture of a clip that is a folder."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def lies_beside(name: str) -> bool:
    """Whether a file of this name is passed over in a folder of pictures."""
    lower = name.lower()
    return lower.startswith(".") or lower in LITTER or lower.endswith(_TEXTS)


def read_picture(path: Path, where: object) -> Picture:
    """Read a file of one picture, laid upright by its EXIF or TIFF orientation.

    A palette is applied; alpha is left out.

    Raises:
        DecodeError: the file is damaged or of another kind, or holds several pictures.
    """
    with reading(where), open_plain(path) as file:
        first = file.read(len(PNG))
        file.seek(0)
        if first[:2] in (b"P5", b"P6"):
            return _read_pnm(file)
        if first[:4] in _TIFF:
            return _read_tiff(path, where)
        chunks = png_chunks(file) if first == PNG else None
        return _read_by_pillow(file, chunks)


@contextmanager
def opened(file: IO[bytes], *formats: str) -> Iterator[Image]:
    """Open a file by Pillow as one of these formats. More than 179 megapixels are refused."""
    from PIL import Image

    file.seek(0)
    # Pillow warns of large pictures and odd metadata; missing pixels are an error.
    with warnings.catch_warnings(action="ignore"):
        image = Image.open(file, formats=formats)
    with image:
        yield image


def _read_by_pillow(file: IO[bytes], chunks: PngChunks | None) -> Picture:
    from PIL import ImageOps

    with opened(file, "PNG", "JPEG", "BMP", "WEBP") as image:
        count = getattr(image, "n_frames", 1)
        if count > 1:
            raise DecodeError(f"holds {count} pictures")
        # Pillow would keep 8 of these bits.
        if chunks is not None and chunks.bits == 16 and chunks.colour:
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise DecodeError("is a turned picture of 16 bits", fix="Save it upright.")
            return _read_deep_png(file)
        return _picture(ImageOps.exif_transpose(image))


def _picture(image: Image) -> Picture:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        is_grey = (palette == palette[:, :1]).all()
        image = image.convert("L" if is_grey else "RGB")
    elif image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode in ("RGBA", "RGBX"):
        image = image.convert("RGB")
    if image.mode in ("L", "RGB"):
        return Picture(np.array(image), GREY if image.mode == "L" else RGB)
    if image.mode.startswith("I;16"):
        return Picture(np.array(image).astype(np.uint16), GREY)
    raise DecodeError(f"has pixels of the kind {image.mode}", fix="Save it as grey or RGB.")


def _read_deep_png(file: IO[bytes]) -> Picture:
    import imagecodecs

    file.seek(0)
    values = imagecodecs.png_decode(file.read())
    if values.shape[-1] == 2:
        return Picture(np.ascontiguousarray(values[..., 0]), GREY)
    return Picture(np.ascontiguousarray(values[..., :3]), RGB)


def _read_tiff(path: Path, where: object) -> Picture:
    from dist_train.data.raw.formats import tiff

    stack = tiff.read(path, where, Choices())
    if stack.count != 1:
        raise DecodeError(f"holds {stack.count} pictures")
    (frame,) = stack.frames
    if stack.channels[:3] == RGB:
        return Picture(np.ascontiguousarray(frame[..., :3]), RGB, stack.bits)
    return Picture(frame, stack.channels, stack.bits)


def _read_pnm(file: IO[bytes]) -> Picture:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    match = _PNM.match(file.read(4096))
    if match is None:
        raise DecodeError("has a damaged header")
    width, height, white = (int(match[number]) for number in (2, 3, 4))
    if not 0 < white < 1 << 16:
        raise DecodeError(f"declares {white} as its highest value")
    shape = (height, width) if match[1] == b"5" else (height, width, 3)
    dtype = np.dtype(">u2" if white > 255 else np.uint8)
    declared, held = math.prod(shape) * dtype.itemsize, size - match.end()
    if declared != held or not declared:
        raise DecodeError(f"declares {declared} bytes of values, holds {held}")
    file.seek(match.end())
    values = np.frombuffer(file.read(held), dtype).reshape(shape)
    if values.max() > white:
        raise DecodeError(f"holds the value {values.max()}, and declares {white} as its highest")
    channels = GREY if match[1] == b"5" else RGB
    bits = white.bit_length()
    is_plain = white == (1 << bits) - 1 and bits >= 8
    return Picture(
        values.astype(dtype.newbyteorder("=")),
        channels,
        bits=bits if is_plain and bits > 8 else None,
        window=None if is_plain else (0.0, float(white)),
    )
