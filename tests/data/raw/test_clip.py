"""One file to one clip: the pixels that a version of the decoder path stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_train.data.raw.clip import PrepareSettings, pixels_version, read_clip, values_of
from dist_train.data.raw.intensity import Intensity
from dist_train.data.raw.stack import Stack
from dist_train.errors import DecodeError, RoiError
from dist_train.files import crc32c

GOLDEN = Path(__file__).parent / "golden"
WHOLE, CROPPED = PrepareSettings(roi="none"), PrepareSettings()


@pytest.mark.parametrize(
    ("name", "settings", "shape", "checksum"),
    [
        ("outlined.mp4", CROPPED, (5, 34, 40), 2100843235),
        ("outlined.mp4", WHOLE, (5, 60, 80), 3888816475),
        ("full_range.avi", WHOLE, (3, 40, 50), 4160429173),
        ("grey.gif", WHOLE, (3, 20, 24), 3890149774),
        ("deep.tif", replace(WHOLE, bits=16), (3, 8, 9), 2908016394),
        ("colour.npy", WHOLE, (2, 8, 9), 994331296),
    ],
)
def test_pixels_of_this_version(
    name: str, settings: PrepareSettings, shape: tuple[int, int, int], checksum: int
) -> None:
    """A store's fingerprint holds the version: if these change, so must ``PIXELS_VERSION``, and the
    numbers here with it."""
    clip, _ = read_clip(GOLDEN / name, name, name, settings)
    assert (pixels_version(settings), clip.shape, crc32c(clip)) == (4, shape, checksum)


def test_a_version_of_the_pixels_is_that_of_stores_that_it_changed() -> None:
    rgb = replace(WHOLE, channel_names=("red", "green", "blue"))
    assert pixels_version(rgb) == pixels_version(replace(WHOLE, intensity=Intensity("bits"))) == 5
    assert pixels_version(rgb, of_files=False) == 4


def test_what_the_record_says() -> None:
    _, record = read_clip(GOLDEN / "outlined.mp4", "outlined.mp4", "here", CROPPED)
    assert record["frames_declared"] == 5
    top, left, bottom, right = record["box"]
    # Drawn from (10, 14) to (44, 50), and moved by a pixel to the right in each of five frames.
    assert max(abs(top - 10), abs(left - 14), abs(bottom - 44), abs(right - 54)) <= 2


def test_place_is_named_and_the_path_is_not() -> None:
    with pytest.raises(RoiError, match=r"^s3://b/v\.npy: a volume has no coloured outline"):
        read_clip(GOLDEN / "colour.npy", "v.npy", "s3://b/v.npy", CROPPED)
    with pytest.raises(DecodeError, match=r"^s3://b/v\.mp4: cannot be opened"):
        read_clip(GOLDEN / "colour.npy", "v.mp4", "s3://b/v.mp4", WHOLE)
    with pytest.raises(DecodeError, match=r"^there: unknown kind of file '\.exe'"):
        read_clip(GOLDEN / "colour.npy", "v.exe", "there", WHOLE)


def test_an_array_by_name_needs_a_format_that_has_names(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(DecodeError, match="'::x' names an array in the file"):
        read_clip(tmp_path / "a.npy", "a.npy::x", "here", PrepareSettings(roi="none"))


def test_lengths_that_are_none_are_not_recorded() -> None:
    frame = np.zeros((4, 4), np.uint8)
    stack = Stack(iter([frame]), frame.dtype, 1, spacing=(0.0, np.nan, 0.5), interval=float("inf"))
    record = values_of(stack, PrepareSettings(roi="none")).record
    assert record["spacing"] == [None, None, 0.5]
    assert "interval" not in record
