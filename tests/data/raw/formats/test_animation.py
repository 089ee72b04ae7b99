"""Animated PNG and WebP: every frame as it is shown, its time, and all damage that can be seen."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.formats import animation
from dist_train.data.raw.stack import Choices
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 18, 25), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 18, 25, 3), np.uint8)
# Only a part changes, which the writers then store alone.
COLOUR[1:, :9] = COLOUR[0, :9]


def write(path: Path, clip: np.ndarray, duration: int | list[int] = 40, **how: object) -> Path:
    first, *more = (Image.fromarray(picture) for picture in clip)
    how = {"lossless": True} | how if path.suffix == ".webp" else how
    first.save(path, save_all=True, append_images=more, duration=duration, **how)
    return path


def values_of(path: Path) -> np.ndarray:
    return np.stack(list(animation.read(path, "here", Choices()).frames))


@pytest.mark.parametrize("suffix", ["png", "apng", "webp"])
def test_values_are_those_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    how = {"format": "PNG"} if suffix == "apng" else {}
    stack = animation.read(write(path, COLOUR, **how), "here", Choices())
    np.testing.assert_array_equal(np.stack(list(stack.frames)), COLOUR)
    assert (stack.count, stack.interval, len(stack.channels)) == (6, 0.04, 3)
    stack = animation.read(write(path, GREY, **how), "here", Choices())
    values = np.stack(list(stack.frames))
    if suffix == "webp":
        # It knows no grey.
        values = values[..., 1]
    np.testing.assert_array_equal(values, GREY)
    assert stack.dtype == np.uint8


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_interval(tmp_path: Path, suffix: str) -> None:
    """The last frame's time is no interval."""
    path = tmp_path / f"a.{suffix}"
    for durations, expected in (
        ([50] * 5 + [1000], 0.05),
        ([50, 50, 60, 50, 50, 50], None),
        ([0] * 6, None),
    ):
        write(path, COLOUR, durations)
        assert animation.read(path, "here", Choices()).interval == expected


def test_a_cover_is_no_frame(tmp_path: Path) -> None:
    """The picture that is shown where animations are not known."""
    cover = np.zeros_like(GREY[:1])
    path = write(tmp_path / "a.png", np.concatenate([cover, GREY]), default_image=True)
    np.testing.assert_array_equal(values_of(path), GREY)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_cut_and_damaged(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", COLOUR)
    whole = path.read_bytes()
    for length in (0, 1, 8, 12, 30, *range(0, len(whole), len(whole) // 40), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DecodeError) as raised:
            values_of(path)
        assert "\n" not in raised.value.reason
    for at in RNG.integers(8, len(whole), 100):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(RNG.integers(8))
        path.write_bytes(damaged)
        try:
            values = values_of(path)
        except DecodeError:
            continue
        # WebP has no checksums, but its chunks are checked.
        assert (values == COLOUR).all() if suffix == "png" else len(values) == 6


def test_16_bits_are_refused(tmp_path: Path) -> None:
    """Pillow would keep 8 of them."""
    path = write(tmp_path / "a.png", GREY)
    content = bytearray(path.read_bytes())
    content[24] = 16
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"animation of 16 bits.*folder of PNG"):
        values_of(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"RIFF\4\0\0\0WEBP", b"\x89PNG\r\n\x1a\n"])
def test_no_animation(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.webp").write_bytes(content)
    with pytest.raises(DecodeError, match=r"^here: "):
        read_clip(tmp_path / "a.webp", "a.webp", "here", PrepareSettings(roi="none"))


def test_a_clip_of_an_animation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    clip, record = read_clip(path, "a.png", "here", PrepareSettings(roi="none"))
    np.testing.assert_array_equal(clip, GREY)
    assert record["frames_declared"] == 6
