"""Every volume file becomes uint8 [D, H, W], or an error that names it; never a crash."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_media import grey_frames, read_volume, write_video
from under_limit import read_under_limit

from dist_train.data.raw.axes import plain_stack
from dist_train.data.raw.clip import PrepareSettings, decoding, to_clip, values_of
from dist_train.errors import DecodeError


def to_uint8_volume(array: np.ndarray, where: str) -> np.ndarray:
    """The clip of a volume in memory."""
    with decoding(where):
        return to_clip(values_of(plain_stack(array), WHOLE), WHOLE)[0]


WHOLE = PrepareSettings(roi="none")
VOLUME = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, only=array)
    else:
        tifffile.imwrite(path, array, photometric="minisblack")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tiff", ".NPY", ".TIF"])
def test_uint8_volume_is_kept(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix.lower()}", VOLUME).rename(tmp_path / f"b{suffix}")
    clip = read_volume(path)
    assert clip.dtype == np.uint8
    assert clip.flags.c_contiguous
    np.testing.assert_array_equal(clip, VOLUME)


def test_of_16_bits_the_highest_8_are_kept(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for dtype in ("<u2", ">u2"):
        path = save(tmp_path / "a.npy", (levels.astype(np.uint16) * 257).astype(dtype))
        np.testing.assert_array_equal(read_volume(path, bits=16), levels)


def test_bool_is_black_and_white() -> None:
    assert to_uint8_volume(VOLUME > 127, "x").tolist() == ((VOLUME > 127) * 255).tolist()


def test_rgb_becomes_luma() -> None:
    array = np.zeros((2, 8, 8, 3), np.uint8)
    array[0], array[1, ..., 0] = (10, 20, 30), 255
    clip = to_uint8_volume(array, "x")
    assert clip.shape == (2, 8, 8)
    assert np.unique(clip[0]).tolist() == [round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)]
    assert np.unique(clip[1]).tolist() == [round(0.299 * 255)]


@pytest.mark.parametrize(
    ("shape", "depth"), [((8, 9), 1), ((8, 9, 3), 1), ((8, 9, 4), 1), ((2, 8, 9, 1), 2)]
)
def test_pictures_and_single_channels(shape: tuple[int, ...], depth: int) -> None:
    assert to_uint8_volume(np.full(shape, 7, np.uint8), "x").shape == (depth, 8, 9)


@pytest.mark.parametrize("shape", [(5,), (0, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DecodeError, match="has shape"):
        to_uint8_volume(np.zeros(shape, np.uint8), "x")


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype("M8[s]")])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(DecodeError, match=r"x: holds .* values. Use uint8"):
        to_uint8_volume(np.zeros((2, 3, 5), dtype), "x")


class Bomb:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["npy", "npz", "bare pickle"])
def test_no_pickle_is_ever_loaded(tmp_path: Path, kind: str) -> None:
    blown = tmp_path / "blown"
    array = np.array([[[Bomb(blown)]]], dtype=object)
    path = tmp_path / ("a.npz" if kind == "npz" else "a.npy")
    if kind == "npz":
        np.savez(path, array)
    elif kind == "npy":
        np.save(path, array)
    else:
        path.write_bytes(array.dumps())
    with pytest.raises(DecodeError, match="cannot be read"):
        read_volume(path)
    assert not blown.exists()


@pytest.mark.parametrize("arrays", [0, 2])
def test_npz_of_another_number_of_arrays(tmp_path: Path, arrays: int) -> None:
    np.savez(tmp_path / "a.npz", *[VOLUME] * arrays)
    with pytest.raises(DecodeError, match=f"holds {arrays} arrays, one is needed"):
        read_volume(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif"])
def test_cut_or_damaged_anywhere_is_never_a_crash(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", VOLUME)
    whole = path.read_bytes()
    cut = (whole[:length] for length in range(0, len(whole) - 1, 7))
    damaged = (
        whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :]
        for place in range(0, min(len(whole), 240), 3)
    )
    refused = 0
    for content in chain(cut, damaged):
        path.write_bytes(content)
        try:
            read_volume(path)
        except DecodeError:
            refused += 1
    assert refused > 5


def test_missing_volume(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"a.npy: cannot be read \(No such file"):
        read_volume(tmp_path / "a.npy")


# Files that are small and say that they are large.


def declaring(shape: tuple[int, ...], size: int) -> bytes:
    """An npy file whose header says ``shape``, and that holds ``size`` bytes of values."""
    content = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue() + bytes(size)


def zipped(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", content)
    return archive.getvalue()


@pytest.mark.parametrize("size", [0, 5 * 6 * 7 - 1])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_larger_than_its_file(tmp_path: Path, suffix: str, size: int) -> None:
    path = tmp_path / f"a{suffix}"
    content = declaring((5, 6, 7), size)
    path.write_bytes(content if suffix == ".npy" else zipped(content))
    with pytest.raises(DecodeError, match=f"declares 210 bytes of values, holds {size}"):
        read_volume(path)


def test_two_arrays_in_one_npy_file(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        for level in (1, 2):
            np.save(file, np.full((2, 3, 4), level, np.uint8))
    with pytest.raises(DecodeError, match="declares 24 bytes of values, holds 176"):
        read_volume(tmp_path / "a.npy")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_npy_form_is_read(tmp_path: Path, version: tuple[int, int], order: str) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, np.asarray(VOLUME, order=order), version=version)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.npy"), VOLUME)


def patched(path: Path, before: bytes, after: bytes) -> bytes:
    content = path.read_bytes()
    assert before in content
    return content.replace(before, after)


def large_gif(path: Path) -> bytes:
    write_video(path, grey_frames(2), codec="gif", pix_fmt="gray")
    return patched(path, struct.pack("<HH", 64, 48), struct.pack("<HH", 16000, 16000))


def large_jpeg(path: Path) -> bytes:
    write_video(path, grey_frames(2), codec="mjpeg", pix_fmt="yuvj420p", full_range=True)
    start = b"\xff\xc0\x00\x11\x08"
    before, after = struct.pack(">HH", 48, 64), struct.pack(">HH", 65535, 65535)
    return patched(path, start + before, start + after)


def large_tiff(path: Path) -> bytes:
    tifffile.imwrite(path, np.zeros((2, 48, 64), np.uint8), photometric="minisblack", metadata=None)
    for tag, value in ((256, 64), (257, 48)):
        # The tag of the width or the height; one value of type LONG.
        before, after = (struct.pack("<HHII", tag, 4, 1, size) for size in (value, 65535))
        path.write_bytes(patched(path, before, after))
    return path.read_bytes()


def deflated_tiff(path: Path) -> bytes:
    zeros = np.zeros((200, 1024, 1024), np.uint8)
    tifffile.imwrite(path, zeros, compression="zlib", photometric="minisblack")
    return path.read_bytes()


TEN_TERABYTES = declaring((10**6, 10**6, 10), 1000)
BOMBS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "large.gif": (large_gif, "takes more memory"),
    "large.avi": (large_jpeg, ""),
    "large.tif": (large_tiff, "pixels of page 0 of 2 are not there"),
    "deflated.tif": (deflated_tiff, "takes more memory"),
    "10 TB.npy": (lambda _: TEN_TERABYTES, "declares 1" + "0" * 13),
    "10 TB.npz": (lambda _: zipped(TEN_TERABYTES), "declares 1" + "0" * 13),
    "deflated.npz": (lambda _: zipped(declaring((200, 1024, 1024), 200 << 20)), "takes more memo"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_the_limit(tmp_path: Path, name: str) -> None:
    make, message = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(make(path))
    assert path.stat().st_size < 1 << 20
    said, took = read_under_limit(path, 100)
    assert said.startswith(f"{path}: ")
    assert message in said
    # Code that is loaded meanwhile comes on top.
    assert took <= 110
