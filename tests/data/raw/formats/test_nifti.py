"""NIfTI files by nibabel, written by ITK and by nibabel with what ITK does not write."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import check_damaged, clip_in, stack_in

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 256, (4, 6, 5), np.uint8)


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...], vector: bool = False) -> Path:
    """By ITK, whose arrays have the axes of numpy: the last is X."""
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    image.SetSpacing(spacing)
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_frames_are_the_planes_of_the_third_axis(tmp_path: Path, name: str, dtype: type) -> None:
    array = (VOLUME.astype(float) - 100).astype(dtype)
    path = write(tmp_path / name.lower(), array, (0.5, 0.25, 2.0)).rename(tmp_path / name)
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, array)
    assert stack.dtype == dtype
    assert stack.spacing == (2000, 250, 500)
    assert (stack.interval, stack.window, stack.channels) == (None, None, ("grey",))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from("fxb"), st.tuples(*[st.integers(1, 5)] * 4), st.integers(0, 4))
def test_any_axis_and_plane(
    tmp_path_factory: pytest.TempPathFactory, order: str, shape: tuple[int, ...], plane: int
) -> None:
    array = RNG.integers(0, 99, shape).astype(np.int16)
    path = tmp_path_factory.getbasetemp() / f"{order}.nii"
    nibabel.save(nibabel.Nifti1Image(array, None), path)
    plane = min(plane, shape[2] - 1)
    frames = stack_in(path, depth_axis="T", plane=plane)[1]
    right = array[:, :, plane] if shape[3] > 1 else array[..., 0]
    np.testing.assert_array_equal(frames, right.T)


def test_time_and_depth_have_to_be_chosen(tmp_path: Path) -> None:
    array = RNG.integers(0, 99, (3, 4, 6, 5)).astype(np.int16)
    image = nibabel.Nifti1Image(array.transpose(3, 2, 1, 0), None)
    image.header.set_xyzt_units("micron", "msec")
    image.header["pixdim"][1:5] = (0.5, 0.25, 2, 40)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(DecodeError, match=r"both time and depth \(Z of 4, T of 3\).*--depth-axis"):
        stack_in(tmp_path / "a.nii")
    stack, frames = stack_in(tmp_path / "a.nii", depth_axis="T", plane=2)
    np.testing.assert_array_equal(frames, array[:, 2])
    assert (stack.spacing, stack.interval) == ((None, 0.25, 0.5), 0.04)
    stack, frames = stack_in(tmp_path / "a.nii", depth_axis="Z", plane=1)
    np.testing.assert_array_equal(frames, array[1])
    assert (stack.spacing, stack.interval) == ((2, 0.25, 0.5), None)


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    stored = VOLUME.T.astype(np.int16)
    image = nibabel.Nifti2Image(stored, None)
    image.header.set_slope_inter(0.5, -1024)
    image.header["cal_min"], image.header["cal_max"] = -1000, -900
    nibabel.save(image, tmp_path / "a.nii.gz")
    stack, frames = stack_in(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(frames, VOLUME * 0.5 - 1024)
    assert stack.dtype == np.float32
    assert stack.window == (-1000, -900)
    # Units that the file does not name are not guessed.
    assert stack.spacing == (None, None, None)


def test_colours_and_channels(tmp_path: Path) -> None:
    for number in (3, 4):
        array = RNG.integers(0, 256, (4, 6, 5, number), np.uint8)
        voxels = array.view([(name, "u1") for name in "RGBA"[:number]])[..., 0].T
        nibabel.save(nibabel.Nifti1Image(voxels, None), tmp_path / "a.nii.gz")
        stack, frames = stack_in(tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(frames, array)
        assert stack.channels == (*RGB, "alpha")[:number]
    array = RNG.normal(size=(4, 6, 5, 2)).astype(np.float32)
    stack, frames = stack_in(write(tmp_path / "b.nii", array, (1, 1, 1), vector=True))
    np.testing.assert_array_equal(frames, array)
    assert stack.channels == ("channel 0", "channel 1")


def test_packed_channels_are_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = RNG.integers(0, 99, (40, 50, 60, 3), np.uint8)
    path, backwards = write(tmp_path / "a.nii.gz", array, (1, 1, 1), vector=True), []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(
        gzip._GzipReader, "_rewind", lambda file: backwards.append(1) or rewind(file)
    )
    np.testing.assert_array_equal(stack_in(path)[1], array)
    assert len(backwards) < 5
    film = nibabel.Nifti1Image(RNG.integers(0, 99, (50, 60, 3, 20, 2), np.uint8), None)
    nibabel.save(film, path)
    frames = stack_in(path, depth_axis="T", plane=1)[1]
    np.testing.assert_array_equal(frames, film.dataobj[:, :, 1].transpose(2, 1, 0, 3))
    assert len(backwards) < 10


def test_through_the_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", VOLUME, (1, 1, 1))
    # As a fetched file, whose path has no suffix.
    np.testing.assert_array_equal(clip_in(path.rename(tmp_path / "fetched"), "a.nii.gz"), VOLUME)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_damaged(tmp_path: Path, name: str) -> None:
    assert check_damaged(write(tmp_path / name, VOLUME, (1, 1, 1))) > 20


def test_a_wrong_value_in_a_packed_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", VOLUME, (1, 1, 1))
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(DecodeError, match="CRC"):
        clip_in(path)


def header_of(path: Path, **entries: object) -> Path:
    write(path, VOLUME, (1, 1, 1))
    raw = bytearray(path.read_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]))
    for name, value in entries.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "is cut short: declares 27000000000000 by"),
        ({"dim": [9, 5, 6, 4, 1, 1, 1, 1]}, r"declares \d+ axes"),
        ({"dim": [3, 5, -6, 4, 1, 1, 1, 1]}, "which is no volume"),
        ({"dim": [6, 5, 6, 1, 1, 1, 4, 1]}, "U is neither time nor depth"),
        ({"datatype": 32, "dim": [3, 5, 3, 1, 1, 1, 1, 1]}, "holds complex64 values"),
        ({"datatype": 1792, "dim": [3, 5, 6, 1, 1, 1, 1, 1]}, "declares 480 bytes"),
        ({"magic": b"ni1"}, "one of a pair of files.*Save it as one file .nii"),
        ({"magic": b""}, "one of a pair of files, or older than NIfTI"),
        ({"sizeof_hdr": 1}, "is no NIfTI file"),
    ],
)
def test_refused(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        clip_in(header_of(tmp_path / "a.nii", **entries))


def test_packed_file_of_a_huge_volume(tmp_path: Path) -> None:
    path = header_of(tmp_path / "a.nii", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DecodeError, match="packed ones cannot hold them"):
        clip_in(tmp_path / "a.nii.gz")


def test_pairs_of_files(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(VOLUME, np.eye(4)), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        with pytest.raises(DecodeError, match=r"is one of a pair of files.*one file .nii"):
            clip_in(tmp_path / name)
