"""NRRD files by pynrrd, written by ITK, and by hand with what ITK does not write."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import numpy as np
import pytest
from raw_files import check_damaged, clip_in, stack_in, write_itk

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 256, (4, 6, 5), np.uint8)


def by_hand(path: Path, header: str, values: bytes = b"") -> Path:
    path.write_bytes(f"NRRD0005\n{header}\n\n".encode() + values)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_values_and_spacing(tmp_path: Path, dtype: type, packed: bool) -> None:
    array = (VOLUME.astype(float) - 100).astype(dtype)
    stack, frames = stack_in(write_itk(tmp_path / "a.nrrd", array, packed))
    np.testing.assert_array_equal(frames, array)
    assert stack.dtype == dtype
    assert stack.spacing == (2000, 250, 500)
    assert stack.channels == ("grey",)


def test_channels_and_colours(tmp_path: Path) -> None:
    array = RNG.normal(size=(4, 6, 5, 2)).astype(np.float32)
    stack, frames = stack_in(write_itk(tmp_path / "a.nrrd", array, vector=True))
    np.testing.assert_array_equal(frames, array)
    assert stack.channels == ("channel 0", "channel 1")
    header = "type: uchar\ndimension: 4\nsizes: 3 5 6 2\nencoding: raw\n"
    header += "kinds: RGB-color domain domain domain"
    array = RNG.integers(0, 256, (2, 6, 5, 3), np.uint8)
    stack, frames = stack_in(by_hand(tmp_path / "b.nrrd", header, array.tobytes()))
    np.testing.assert_array_equal(frames, array)
    assert stack.channels == RGB


def test_frames_in_time(tmp_path: Path) -> None:
    header = "type: ushort\ndimension: 3\nsizes: 5 6 4\nendian: big\nencoding: raw\n"
    header += 'kinds: domain domain time\nspacings: 0.5 0.25 40\nunits: "um" "mm" "ms"'
    array = RNG.integers(0, 65536, (4, 6, 5)).astype(">u2")
    stack, frames = stack_in(by_hand(tmp_path / "a.nrrd", header, array.tobytes()))
    np.testing.assert_array_equal(frames, array)
    assert stack.spacing == (None, 250, 0.5)
    assert stack.interval == 0.04


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    packed = {
        "raw": VOLUME.tobytes(),
        "gzip": gzip.compress(VOLUME.tobytes()),
        "bzip2": bz2.compress(VOLUME.tobytes()),
        "ascii": " ".join(map(str, VOLUME.ravel())).encode(),
    }[encoding]
    header = f"type: uint8\ndimension: 3\nsizes: 5 6 4\nencoding: {encoding}"
    stack, frames = stack_in(by_hand(tmp_path / "a.nrrd", header, packed))
    np.testing.assert_array_equal(frames, VOLUME)
    assert stack.spacing == (None, None, None)


@pytest.mark.parametrize("packed", [False, True])
def test_damaged(tmp_path: Path, packed: bool) -> None:
    assert check_damaged(write_itk(tmp_path / "a.nrrd", VOLUME, packed)) > 20


def test_through_the_clip(tmp_path: Path) -> None:
    path = write_itk(tmp_path / "a.nrrd", VOLUME).rename(tmp_path / "fetched")
    np.testing.assert_array_equal(clip_in(path, "a.NRRD"), VOLUME)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr"])
@pytest.mark.parametrize("key", ["data file", "datafile"])
def test_no_other_file_is_opened(tmp_path: Path, key: str, name: str) -> None:
    header = f"type: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n{key}: values.raw"
    (tmp_path / "values.raw").write_bytes(bytes(8))
    with pytest.raises(DecodeError, match=r"values in another file.*one file .nrrd"):
        clip_in(by_hand(tmp_path / name, header))


PLAIN = "type: uint8\nencoding: raw\n"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (PLAIN + "dimension: 3\nsizes: 90000 90000 90000", "Size of the data"),
        (PLAIN + "dimension: 3\nsizes: 3 3 0", "hold no value"),
        (PLAIN + "dimension: 3\nsizes: 3 3", "Number of elements in sizes"),
        (PLAIN + "dimension: 4\nsizes: 1 2 2 2\nkinds: complex domain domain domain", "complex"),
        (PLAIN + "dimension: 4\nsizes: 1 2 2 2\nkinds: time time domain domain", "has axes of the"),
        (PLAIN + "dimension: 5\nsizes: 1 2 1 2 2", "U is neither time nor depth"),
        (PLAIN + "dimension: 4\nsizes: 1 2 2 2", "both time and depth"),
        ("type: block\nencoding: raw\ndimension: 3\nsizes: 2 2 2", "cannot be read"),
        (PLAIN, "cannot be read"),
    ],
)
def test_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        clip_in(by_hand(tmp_path / "a.nrrd", header, bytes(8)))


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(b"")
    with pytest.raises(DecodeError, match="is no NRRD file"):
        clip_in(tmp_path / "a.nrrd")


@pytest.mark.parametrize(
    ("units", "interval"),
    [("", None), ('space units: "mm" "mm" "mm" "s"', 2), ('space units: "mm" "mm" "mm" ""', None)],
)
def test_time_has_a_unit_of_its_own(tmp_path: Path, units: str, interval: float | None) -> None:
    header = "type: uint8\ndimension: 4\nspace: left-posterior-superior-time\nsizes: 5 6 1 4\n"
    header += "encoding: raw\nkinds: space space space time\n"
    header += "space directions: (0.5,0,0,0) (0,0.25,0,0) (0,0,1,0) (0,0,0,2)"
    path = by_hand(tmp_path / "a.nrrd", "\n".join(filter(None, (header, units))), VOLUME.tobytes())
    stack, _ = stack_in(path)
    assert stack.interval == interval
    assert stack.spacing == (None, 250, 500)
