"""What every reader of a file format must do with its files, and with damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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


def clip_in(path: Path, name: str | None = None) -> np.ndarray:
    return read_clip(path, name or path.name, str(path), PrepareSettings(roi="none"))[0]


def check_damaged(path: Path, sizes: int = 40, seed: int = 0) -> int:
    """Cut a file of uint8 at many places, and flip bits: right frames or DecodeError.

    Returns the number of DecodeErrors.
    """
    whole, right = path.read_bytes(), clip_in(path)
    places = np.unique(np.linspace(0, len(whole) - 1, sizes).astype(int))
    refused = 0
    for length in [*places, len(whole) - 1, len(whole) - 2, len(whole) - 9]:
        path.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(clip_in(path), right, f"cut to {length}")
        except DecodeError:
            refused += 1
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
