"""HDF5 files: one array, or the one that is named; nothing outside the file is opened."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from raw_files import check_damaged, clip_in, stack_in

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 256, (9, 6, 5), np.uint8)


def write(path: Path, array: np.ndarray = VOLUME, name: str = "a", **how: object) -> h5py.Dataset:
    return h5py.File(path, "w").create_dataset(name, data=array, **how)


@pytest.mark.parametrize("how", [{}, {"chunks": (4, 3, 5)}, {"chunks": True, "compression": 4}])
@pytest.mark.parametrize("dtype", ["u1", ">u2", "i2", "f4", "f8", "f2", "?"])
def test_values(tmp_path: Path, dtype: str, how: dict[str, object]) -> None:
    array = VOLUME.astype(dtype)
    write(tmp_path / "a.h5", array, **how).file.close()
    stack, frames = stack_in(tmp_path / "a.h5")
    np.testing.assert_array_equal(frames, array)
    assert stack.dtype == np.dtype(dtype).newbyteorder("=")


def test_named_arrays(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["t0/raw"], file["t0/mask"] = VOLUME, VOLUME[:4]
        file["time"], file["name"] = np.arange(5), "nobody"
    path = tmp_path / "a.hdf5"
    with pytest.raises(DecodeError, match=r"holds 2 arrays \(t0/mask \[4, 6, 5\], t0/raw .*::NAME"):
        stack_in(path)
    for name in ("t0/raw", "/t0/raw"):
        np.testing.assert_array_equal(stack_in(path, dataset=name)[1], VOLUME)
    np.testing.assert_array_equal(clip_in(path, "a.hdf5::t0/mask"), VOLUME[:4])
    with pytest.raises(DecodeError, match=r"has no array t0/new. It has: t0/mask, t0/raw"):
        clip_in(path, "a.hdf5::t0/new")
    with pytest.raises(DecodeError, match="has no array of numbers with two axes or more at t"):
        stack_in(path, dataset="time")
    with pytest.raises(DecodeError, match="has no array of numbers with two axes or more at t0"):
        stack_in(path, dataset="t0")


def test_axes_and_spacing_of_ilastik(tmp_path: Path) -> None:
    array = RNG.integers(0, 99, (2, 6, 1, 5, 4), np.uint8)
    data = write(tmp_path / "a.h5", array, chunks=True)
    data.attrs["axistags"] = json.dumps({"axes": [{"key": key, "typeFlags": 2} for key in "cytxz"]})
    data.attrs["element_size_um"] = (2.0, 0.5, 0.25)
    data.file.close()
    stack, frames = stack_in(tmp_path / "a.h5")
    np.testing.assert_array_equal(frames, array[:, :, 0].transpose(3, 1, 2, 0))
    assert stack.channels == ("channel 0", "channel 1")
    assert stack.spacing == (2, 0.5, 0.25)


def test_labels_of_dimensions(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5", chunks=(9, 6, 1))
    for dimension, label in zip(data.dims, "xyt", strict=True):
        dimension.label = label
    data.file.close()
    np.testing.assert_array_equal(stack_in(tmp_path / "a.h5")[1], VOLUME.T)


def test_long_labels_of_dimensions(tmp_path: Path) -> None:
    array = RNG.integers(0, 99, (2, 5, 6, 4), np.uint8)
    data = write(tmp_path / "a.h5", array)
    for dimension, label in zip(data.dims, ("channel", "Row", "col", "time"), strict=True):
        dimension.label = label
    data.file.close()
    stack, frames = stack_in(tmp_path / "a.h5")
    np.testing.assert_array_equal(frames, array.transpose(3, 1, 2, 0))
    assert stack.channels == ("channel 0", "channel 1")


def test_other_labels_of_dimensions_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5")
    data.dims[0].label = "angle"
    data.file.close()
    with pytest.raises(DecodeError, match="has the axes angle, , , which are no stack"):
        clip_in(tmp_path / "a.h5")


def labelled(path: Path, *labels: str, array: np.ndarray = VOLUME) -> Path:
    data = write(path, array)
    for dimension, label in zip(data.dims, labels, strict=True):
        dimension.label = label
    data.file.close()
    return path


def test_labels_of_some_axes_must_agree_with_the_rule_of_plain_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for labels in (("time", "", ""), ("", "y", ""), ("z", "", "x")):
        np.testing.assert_array_equal(stack_in(labelled(path, *labels))[1], VOLUME)
    for labels in (("", "", "t"), ("c", "", ""), ("x", "", "")):
        with pytest.raises(DecodeError, match=r"some of its axes alone \(.*Name all of them t, z"):
            stack_in(labelled(path, *labels))
    array = RNG.integers(0, 99, (2, 6, 5, 2), np.uint8)
    labelled(path, "t", "", "", "c", array=array)
    np.testing.assert_array_equal(stack_in(path, channels="all")[1], array)


def test_a_plain_array_of_colours(tmp_path: Path) -> None:
    array = RNG.integers(0, 99, (2, 6, 5, 3), np.uint8)
    write(tmp_path / "a.h5", array).file.close()
    stack, frames = stack_in(tmp_path / "a.h5")
    np.testing.assert_array_equal(frames, array)
    assert stack.channels == RGB


@pytest.mark.parametrize("how", [{}, {"chunks": (2, 6, 5), "compression": 4}])
def test_damaged(tmp_path: Path, how: dict[str, object]) -> None:
    write(tmp_path / "a.h5", **how).file.close()
    assert check_damaged(tmp_path / "a.h5", 30) > 10


def test_no_other_file_is_opened(tmp_path: Path) -> None:
    write(tmp_path / "b.h5").file.close()
    VOLUME.tofile(tmp_path / "b.raw")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("b.h5", "/a")
        file["soft"] = h5py.SoftLink("/link")
        layout = h5py.VirtualLayout(VOLUME.shape, VOLUME.dtype)
        layout[:] = h5py.VirtualSource(str(tmp_path / "b.h5"), "a", VOLUME.shape)
        file.create_virtual_dataset("virtual", layout)
        parts = [(str(tmp_path / "b.raw"), 0, VOLUME.size)]
        file.create_dataset("raw", VOLUME.shape, VOLUME.dtype, external=parts)
    for name, message in {
        "link": "has a link at link",
        "soft": "has a link at soft",
        "virtual": "has the values of /virtual in other files",
        "raw": "has the values of /raw in other files",
    }.items():
        with pytest.raises(DecodeError, match=message):
            stack_in(tmp_path / "a.h5", dataset=name)


@pytest.mark.parametrize("how", [{}, {"chunks": (4, 6, 5)}])
def test_values_that_were_never_written(tmp_path: Path, how: dict[str, object]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("a", VOLUME.shape, "u1", **how)
        if how:
            data[:4] = VOLUME[:4]
    with pytest.raises(DecodeError, match="1 of 3 chunks of /a were written" if how else "holds 0"):
        clip_in(tmp_path / "a.h5")


def test_huge_arrays(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (90000, 90000, 90000), "u1")
    with pytest.raises(DecodeError, match="declares 729000000000000 bytes of values, holds 0"):
        clip_in(tmp_path / "a.h5")


def test_a_filter_that_is_not_installed(tmp_path: Path) -> None:
    space = h5py.h5s.create_simple(VOLUME.shape)
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(VOLUME.shape)
    # An optional filter may be missing when values are written.
    settings.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = h5py.h5d.create(file.id, b"a", h5py.h5t.NATIVE_UINT8, space, settings)
        data.write(h5py.h5s.ALL, h5py.h5s.ALL, VOLUME)
    with pytest.raises(DecodeError, match=r"packed by a filter that is not installed.*hdf5plugin"):
        clip_in(tmp_path / "a.h5")


def test_axes_that_are_no_pictures(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5")
    data.attrs["axistags"] = json.dumps({"axes": [{"key": key} for key in "tzc"]})
    data.file.close()
    with pytest.raises(DecodeError, match="has the axes t, z, c, which are no stack"):
        clip_in(tmp_path / "a.h5")


def test_another_kind_of_file(tmp_path: Path) -> None:
    for content in (b"", b"nothing"):
        (tmp_path / "a.h5").write_bytes(content)
        with pytest.raises(DecodeError, match="cannot be read"):
            clip_in(tmp_path / "a.h5")
    h5py.File(tmp_path / "a.h5", "w").close()
    with pytest.raises(DecodeError, match="holds no array of numbers"):
        clip_in(tmp_path / "a.h5")
