"""MetaImage files, written by ITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from raw_files import check_damaged, clip_in, stack_in, write_itk

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 256, (4, 6, 5), np.uint8)
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_spacing(tmp_path: Path, dtype: str, packed: bool) -> None:
    array = (VOLUME.astype(float) - 100 * (dtype[0] != "u")).astype(dtype)
    stack, frames = stack_in(write_itk(tmp_path / "a.mha", array, packed))
    np.testing.assert_array_equal(frames, array)
    assert stack.dtype == dtype
    assert stack.spacing == (2000, 250, 500)
    assert stack.channels == ("grey",)


def test_channels_time_and_pictures(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (4, 6, 5, 3), np.uint8)
    stack, frames = stack_in(write_itk(tmp_path / "a.mha", array, vector=True))
    np.testing.assert_array_equal(frames, array)
    assert stack.channels == RGB
    array = RNG.normal(size=(4, 6, 5, 2)).astype(np.float32)
    stack, frames = stack_in(write_itk(tmp_path / "b.mha", array, vector=True))
    np.testing.assert_array_equal(frames, array)
    assert stack.channels == ("channel 0", "channel 1")
    array = RNG.integers(0, 256, (2, 4, 6, 5), np.uint8)
    frames = stack_in(write_itk(tmp_path / "c.mha", array), depth_axis="T", plane=3)[1]
    np.testing.assert_array_equal(frames, array[:, 3])
    np.testing.assert_array_equal(clip_in(write_itk(tmp_path / "d.mha", VOLUME[0])), VOLUME[:1])


def test_big_endian_in_micrometres(tmp_path: Path) -> None:
    """As the header's definition has it; ITK writes neither here."""
    path = write_itk(tmp_path / "a.mha", VOLUME.astype("u2"))
    text = path.read_bytes().partition(b"LOCAL\n")[0]
    text = text.replace(b"MSB = False", b"MSB = True").replace(
        b"ElementType", b"DistanceUnits = um\nElementType"
    )
    path.write_bytes(text + b"LOCAL\n" + VOLUME.astype(">u2").tobytes())
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, VOLUME)
    assert stack.spacing == (2, 0.25, 0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_damaged(tmp_path: Path, packed: bool) -> None:
    assert check_damaged(write_itk(tmp_path / "a.mha", VOLUME, packed)) > 20


def test_through_the_clip(tmp_path: Path) -> None:
    path = write_itk(tmp_path / "a.mha", VOLUME).rename(tmp_path / "fetched")
    np.testing.assert_array_equal(clip_in(path, "a.mha"), VOLUME)


def test_values_in_another_file(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"values in another file.*one file .mha"):
        clip_in(write_itk(tmp_path / "a.mhd", VOLUME))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            b"DimSize = 5 6 4",
            b"DimSize = 90000 90000 4",
            "declares 32400000000 bytes of values, ho",
        ),
        (b"DimSize = 5 6 4", b"DimSize = 5 6", "which are of no volume"),
        (b"DimSize = 5 6 4", b"DimSize = 5 0 4", "which are of no volume"),
        (b"DimSize", b"Size", "cannot be read"),
        (b"CompressedData = False", b"CompressedData = True", "cannot be read"),
        (b"MET_UCHAR", b"MET_LONG", "holds values of the type MET_LONG"),
        (b"ObjectType = Image", b"ObjectType = Tube", "is no MetaImage"),
        (b"BinaryData = True", b"BinaryData = False", "is no MetaImage"),
        (b"ElementType", b"HeaderSize = 9\nElementType", "HeaderSize"),
        (b"= LOCAL", b"= LIST", "values in another file"),
        (b"ElementDataFile", b"Data", "is no MetaImage"),
    ],
)
def test_refused(tmp_path: Path, before: bytes, after: bytes, message: str) -> None:
    path = write_itk(tmp_path / "a.mha", VOLUME)
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))
    with pytest.raises(DecodeError, match=message):
        clip_in(path)


def test_packed_file_of_a_huge_volume(tmp_path: Path) -> None:
    path = write_itk(tmp_path / "a.mha", VOLUME, packed=True)
    path.write_bytes(path.read_bytes().replace(b"DimSize = 5 6 4", b"DimSize = 90000 90000 4"))
    with pytest.raises(DecodeError, match="packed ones cannot hold them"):
        clip_in(path)
