"""What every reader of a file format must do with its files, and with damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.formats import format_of
from dist_train.data.raw.stack import Choices, Stack
from dist_train.errors import DecodeError


def stack_in(path: Path, **choices: object) -> tuple[Stack, np.ndarray]:
    """What the format's reader gives, and all of its frames."""
    form = format_of(path.name, path)
    assert form is not None
    stack = form.read(path, path, Choices(**choices))
    frames = np.stack(list(stack.frames))
    assert frames.dtype == stack.dtype
    assert len(frames) == stack.count
    return stack, frames


def write_itk(path: Path, array: np.ndarray, packed: bool = False, vector: bool = False) -> Path:
    """By ITK, whose arrays have the axes of numpy: the last is X."""
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    image.SetSpacing((0.5, 0.25, 2.0, 1.0)[: image.GetDimension()])
    SimpleITK.WriteImage(image, str(path), packed)
    return path


def clip_in(path: Path, name: str | None = None, bits: int | None = None) -> np.ndarray:
    settings = PrepareSettings(roi="none", bits=bits)
    return read_clip(path, name or path.name, str(path), settings)[0]


def _cut(content: bytes, sizes: int) -> list[bytes]:
    """What is left of a file that is cut at many places, empty, or without its magic."""
    places = {*np.linspace(0, len(content) - 1, sizes).astype(int).tolist(), 4}
    places |= {len(content) - n for n in (1, 2, 9)}
    return [content[:place] for place in sorted(places)] + [bytes(8) + content[8:]]


def read_cut_anywhere(
    path: Path, right: np.ndarray, sizes: int = 60, bits: int | None = None
) -> int:
    """Cut a file at many places, empty it, and exchange its magic: right frames or DecodeError.

    Returns how often it was read in spite of that.
    """
    content, read = path.read_bytes(), 0
    np.testing.assert_array_equal(clip_in(path, bits=bits), right)
    for left in _cut(content, sizes):
        path.write_bytes(left)
        try:
            clip = clip_in(path, bits=bits)
        except DecodeError:
            continue
        np.testing.assert_array_equal(clip, right, f"cut to {len(left)}")
        read += 1
    path.write_bytes(content)
    return read


def damage_is_named(path: Path, kind: str) -> None:
    """Assert that an empty file and one of another kind are refused in words, not by an error."""
    content = path.read_bytes()
    for bytes_, said in ((b"", "is empty"), (b"%PDF-1.7" + content[8:], f"is no {kind} file")):
        path.write_bytes(bytes_)
        with pytest.raises(DecodeError, match=said):
            clip_in(path)
    path.write_bytes(content)


def check_damaged(path: Path, sizes: int = 40, seed: int = 0) -> int:
    """``read_cut_anywhere`` of a file of uint8, and flipped bits: a clip or DecodeError.

    Returns the number of DecodeErrors.
    """
    whole = path.read_bytes()
    refused = len(_cut(whole, sizes)) - read_cut_anywhere(path, clip_in(path), sizes)
    rng = np.random.default_rng(seed)
    for _ in range(sizes):
        changed = bytearray(whole)
        for place in rng.integers(0, rng.choice([min(400, len(whole)), len(whole)]), 3):
            changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            clip_in(path)
        except DecodeError:
            refused += 1
    path.write_bytes(whole)
    return refused
