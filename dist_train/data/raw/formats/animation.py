"""Animated PNG and WebP, by Pillow. Animated GIF is a video (see ``video``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dist_train.data.raw.chunks import GREY_TYPES, PNG, PngChunks, png_chunks, webp_seconds
from dist_train.data.raw.damage import reading
from dist_train.data.raw.picture import PACKAGES as PACKAGES
from dist_train.data.raw.picture import opened
from dist_train.data.raw.stack import GREY, RGB, Choices, Stack
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".png", ".apng", ".webp")


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the frames of an animation as a viewer shows them; alpha is left out.

    Raises:
        DecodeError: the file is a single picture, is damaged, or has 16 bits.
    """
    with reading(where), open_plain(path) as file:
        first = file.read(len(PNG))
        chunks = png_chunks(file) if first == PNG else None
        seconds = webp_seconds(file) if chunks is None and first[:4] == b"RIFF" else ()
    if chunks is not None:
        seconds = chunks.seconds
        if chunks.bits == 16 and seconds:
            raise DecodeError(
                "is an animation of 16 bits", fix="Save its frames as a folder of PNG files."
            )
    elif first[:4] != b"RIFF":
        raise DecodeError("cannot be read (it is no PNG or WebP)" if first else "is empty")
    if not seconds:
        raise DecodeError(
            "is a single picture",
            fix="Let the table name the folder of a clip's pictures, or put them into one "
            "multi-page TIFF, in order.",
        )
    is_grey = chunks is not None and chunks.colour in GREY_TYPES
    return Stack(
        _frames(path, where, chunks, len(seconds), "L" if is_grey else "RGB"),
        np.dtype(np.uint8),
        len(seconds),
        channels=GREY if is_grey else RGB,
        interval=_interval(seconds),
    )


def _interval(seconds: Sequence[float]) -> float | None:
    """The time between frames, None if it varies by more than 1 %. The last frame has none."""
    times = seconds[:-1]
    if not times or max(times) > 1.01 * min(times) or not min(times):
        return None
    return float(np.median(times))


def _frames(
    path: Path, where: object, chunks: PngChunks | None, count: int, mode: str
) -> Iterator[np.ndarray]:
    # Pillow counts the cover as a picture.
    skipped = int(chunks is not None and chunks.has_cover)
    with reading(where), open_plain(path) as file, opened(file, "PNG", "WEBP") as image:
        held = getattr(image, "n_frames", 1) - skipped
        if held != count:
            raise DecodeError(f"holds {held} of {count} declared frames")
        for number in range(skipped, count + skipped):
            image.seek(number)
            yield np.array(image.convert(mode))
