"""NumPy's files as stacks: types, axes and channels. See also ``test_volume_file``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from raw_files import stack_in

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

DTYPES = ("u1", "<u2", ">u2", "i1", "<i2", ">i4", "u8", "i8", "<f2", ">f4", "f8", "?")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_type_are_kept(tmp_path: Path, dtype: str, suffix: str) -> None:
    array = np.random.default_rng(0).integers(0, 120, (3, 4, 5)).astype(dtype)
    path = tmp_path / f"a.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, array)
    stack, frames = stack_in(path)
    assert stack.dtype == np.dtype(dtype).newbyteorder("=")
    assert stack.channels == ("grey",)
    np.testing.assert_array_equal(frames, array)


def test_channels_are_read_if_they_are_chosen(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 9, (3, 4, 5, 2))
    np.save(tmp_path / "a.npy", array)
    stack, frames = stack_in(tmp_path / "a.npy", channels="0")
    assert stack.channels == ("channel 0", "channel 1")
    np.testing.assert_array_equal(frames, array)
    with pytest.raises(DecodeError, match=r"has shape \[3, 4, 5, 2\], not .*Choose --channels"):
        stack_in(tmp_path / "a.npy")


def test_colour_has_its_names(tmp_path: Path) -> None:
    for number in (3, 4):
        np.save(tmp_path / "a.npy", np.zeros((2, 4, 5, number), np.uint8))
        assert stack_in(tmp_path / "a.npy")[0].channels == (*RGB, "alpha")[:number]


@pytest.mark.parametrize("dtype", ["c8", "S3", "M8[s]", "f8,i4"])
def test_values_that_are_no_numbers(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 5), dtype))
    with pytest.raises(DecodeError, match=r"holds .* values"):
        stack_in(tmp_path / "a.npy")
