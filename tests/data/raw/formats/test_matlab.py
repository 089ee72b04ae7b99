"""MATLAB's files: those of MATLAB itself (SciPy has some), and both forms written here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import h5py
import numpy as np
import pytest
from raw_files import check_damaged, clip_in, stack_in
from scipy.io import loadmat, savemat

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
#: As MATLAB indexes it: rows, columns, frames.
VARIABLE = RNG.integers(0, 256, (6, 5, 9), np.uint8)


def write(path: Path, new: bool, **variables: np.ndarray) -> Path:
    if not new:
        savemat(path, variables, do_compression=True)
        return path
    # As MATLAB does (its own classes, and axes in the order of Fortran).
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in variables.items():
            is_bool = array.dtype == bool
            data = file.create_dataset(name, data=array.astype("u1" if is_bool else array.dtype).T)
            kind = {"f": {4: "single", 8: "double"}.get(array.itemsize), "b": "logical"}
            data.attrs["MATLAB_class"] = np.bytes_(kind.get(array.dtype.kind) or str(array.dtype))
    content = bytearray(path.read_bytes())
    content[:19] = b"MATLAB 7.3 MAT-file"
    path.write_bytes(content)
    return path


@pytest.fixture(params=[False, True], ids=["v5", "v7.3"])
def new(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "f4", "f8", "?"])
def test_frames_are_the_third_axis(tmp_path: Path, dtype: str, new: bool) -> None:
    path = write(tmp_path / "a.mat", new, clip=VARIABLE.astype(dtype), rate=np.ones((1, 1)))
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, VARIABLE.astype(dtype).transpose(2, 0, 1))
    assert stack.dtype == np.dtype(dtype)


def test_colours_and_channels(tmp_path: Path, new: bool) -> None:
    array = RNG.integers(0, 256, (6, 5, 3, 4), np.uint8)
    stack, frames = stack_in(write(tmp_path / "a.mat", new, a=array))
    np.testing.assert_array_equal(frames, array.transpose(3, 0, 1, 2))
    assert stack.channels == RGB
    array = RNG.integers(0, 256, (6, 5, 2, 4), np.uint8)
    path = write(tmp_path / "a.mat", new, a=array)
    with pytest.raises(DecodeError, match=r"\[6, 5, 2, 4\], not \[height, width, depth\]. Choose"):
        stack_in(path)
    np.testing.assert_array_equal(stack_in(path, channels="all")[1], array.transpose(3, 0, 1, 2))


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write(tmp_path / "a.mat", False, a=VARIABLE), []
    monkeypatch.setattr("scipy.io.loadmat", lambda *a, **k: calls.append(1) or loadmat(*a, **k))
    np.testing.assert_array_equal(stack_in(path)[1], VARIABLE.transpose(2, 0, 1))
    assert len(calls) == 1


def test_named_variables(tmp_path: Path, new: bool) -> None:
    path = write(tmp_path / "a.mat", new, clip=VARIABLE, mask=VARIABLE > 9)
    with pytest.raises(DecodeError, match=r"holds 2 arrays .*FILE::NAME"):
        clip_in(path)
    np.testing.assert_array_equal(clip_in(path, "a.mat::clip"), VARIABLE.transpose(2, 0, 1))
    with pytest.raises(DecodeError, match=r"has no array other. It has: clip, mask"):
        clip_in(path, "a.mat::other")


def test_damaged(tmp_path: Path, new: bool) -> None:
    assert check_damaged(write(tmp_path / "a.mat", new, a=VARIABLE), 30) > 10


@pytest.mark.parametrize("name", ["test3dmatrix_6.1_SOL2", "test3dmatrix_7.4_GLNX86"])
def test_files_of_matlab(name: str) -> None:
    path = Path(str(files("scipy.io.matlab.tests") / "data" / f"{name}.mat"))
    stack, frames = stack_in(path)
    # reshape(1:24, [2, 3, 4]), as the file's tests in SciPy say.
    right = np.arange(1, 25).reshape((2, 3, 4), order="F").transpose(2, 0, 1)
    np.testing.assert_array_equal(frames, right)
    assert stack.dtype == np.float64
