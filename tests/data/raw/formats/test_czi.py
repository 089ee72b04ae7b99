"""CZI files by Zeiss's own writer; czifile, which shares no code with it, sees the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_media import read_volume
from raw_files import damage_is_named, read_cut_anywhere, stack_in

from dist_train.data.raw.formats.czi import read
from dist_train.data.raw.stack import RGB, Choices
from dist_train.errors import DecodeError

czi = pytest.importorskip("pylibCZIrw.czi")
VALUES = np.random.default_rng(0).integers(0, 1 << 16, (3, 4, 2, 20, 24), np.uint16)
SCALES = {"scale_x": 0.5e-6, "scale_y": 0.25e-6, "scale_z": 2e-6}
Plane = tuple[np.ndarray, Mapping[str, int]]


def write(
    path: Path, planes: Iterable[Plane], compression: str = "uncompressed:", **how: Any
) -> Path:
    """Write pictures, each with its place on the axes; S is the scene, X and Y the tile's."""
    with czi.create_czi(str(path), exist_ok=True, compression_options=compression) as writer:
        for picture, at in planes:
            plane = {axis: place for axis, place in at.items() if axis not in "SXY"}
            values = picture if picture.ndim == 3 else picture[..., None]
            location = at.get("X", 0), at.get("Y", 0)
            writer.write(values, location=location, plane=plane, scene=at.get("S", 0))
        writer.write_metadata(**how)
    return path


def hyperstack(values: np.ndarray = VALUES) -> list[Plane]:
    """Each plane of [T, Z, C, H, W]."""
    return [(values[at], dict(zip("TZC", at, strict=True))) for at in np.ndindex(values.shape[:3])]


@pytest.mark.parametrize("compression", ["uncompressed:", "zstd0:", "zstd1:ExplicitLevel=2"])
def test_time_depth_and_channels(tmp_path: Path, compression: str) -> None:
    names = {0: "DAPI", 1: "GFP"}
    path = write(tmp_path / "a.czi", hyperstack(), compression, channel_names=names, **SCALES)
    stack, frames = stack_in(path, depth_axis="Z", plane=2)
    np.testing.assert_array_equal(frames, np.moveaxis(VALUES[2], 1, -1))
    assert stack.channels == ("DAPI", "GFP")
    assert stack.spacing == pytest.approx((2.0, 0.25, 0.5))
    stack, frames = stack_in(path, depth_axis="T", plane=3)
    np.testing.assert_array_equal(frames, np.moveaxis(VALUES[:, 3], 1, -1))
    assert stack.spacing[0] is None
    with pytest.raises(DecodeError, match="both time and depth"):
        read(path, path, Choices())
    clip = read_volume(path, bits=16, depth_axis="Z", plane=0, channels="1")
    np.testing.assert_array_equal(clip, VALUES[0, :, 1] >> 8)


def test_another_library_sees_the_same(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        czifile = pytest.importorskip("czifile")
        path = write(tmp_path / "a.czi", hyperstack(VALUES[:1, :, :1]))
        other = czifile.imread(path).squeeze()
    np.testing.assert_array_equal(stack_in(path)[1], other)


def test_metadata_of_zen(tmp_path: Path) -> None:
    """The writer does not have them: they take the room of a long name."""
    values = VALUES[:, :1, :1] >> 4
    path = write(tmp_path / "a.czi", hyperstack(values), channel_names={0: "x" * 200})
    content = path.read_bytes()
    start, end = content.index(b"<Dimensions>"), content.index(b"</Dimensions>")
    interval = "<Interval><Start>0</Start><Increment>0.5</Increment></Interval>"
    said = f"<Dimensions><T><Positions>{interval}</Positions></T></Dimensions>"
    said = f"<ComponentBitCount>12</ComponentBitCount>{said}<Dimensions>"
    path.write_bytes(content[:start] + said.encode().ljust(end - start) + content[end:])
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, values[:, 0, 0])
    assert (stack.interval, stack.bits) == (0.5, 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_types_of_values(tmp_path: Path, dtype: type) -> None:
    values = VALUES[:1, :, :1].astype(dtype)
    stack, frames = stack_in(write(tmp_path / "a.czi", hyperstack(values)))
    np.testing.assert_array_equal(frames, values[0, :, 0])
    assert (stack.channels, stack.spacing) == (("grey",), (None, None, None))


def test_colour_is_stored_blue_first(tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (3, 8, 9, 3), np.uint8)
    path = write(tmp_path / "a.czi", [(bgr, {"T": t}) for t, bgr in enumerate(pictures)])
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, pictures[..., ::-1])
    assert stack.channels == RGB


def test_scenes_and_tiles(tmp_path: Path) -> None:
    """Two scenes of two tiles each, the second one elsewhere on the slide."""
    picture = VALUES[0, 0, 0]
    planes = [
        (half + np.uint16(s), {"S": s, "Z": z, "X": 100 * s + 12 * n, "Y": 5})
        for s in range(2)
        for z in range(2)
        for n, half in enumerate((picture[:, :12], picture[:, 12:]))
    ]
    path = write(tmp_path / "a.czi", planes)
    with pytest.raises(DecodeError, match=r"holds 2 series of pictures \(0 scene 0, 1 scene 1\)"):
        read(path, path, Choices())
    _, frames = stack_in(path, series=1)
    np.testing.assert_array_equal(frames, np.stack([picture + np.uint16(1)] * 2))
    write(path, planes[:7])
    stack_in(path, series=0)
    with pytest.raises(DecodeError, match="tiles leave gaps"):
        read(path, path, Choices(series=1))


def test_a_missing_plane(tmp_path: Path) -> None:
    """The library gives black."""
    planes = hyperstack(VALUES[:1])
    path = write(tmp_path / "a.czi", planes[:3] + planes[4:])
    with pytest.raises(DecodeError, match="plane 3 of 8 is not there"):
        read(path, path, Choices())
    write(path, planes[:2] + planes[4:])
    with pytest.raises(DecodeError, match="has 3 of 4 planes on axis Z"):
        read(path, path, Choices())


def test_values_of_two_kinds(tmp_path: Path) -> None:
    planes = hyperstack(VALUES[:1, :1, :1])
    planes += [(VALUES[0, 0, 0].astype(np.uint8), {"T": 0, "Z": 0, "C": 1})]
    path = write(tmp_path / "a.czi", planes)
    with pytest.raises(DecodeError, match="values of the kinds"):
        read(path, path, Choices())


@pytest.mark.parametrize("compression", ["uncompressed:", "zstd1:ExplicitLevel=2"])
def test_cut_or_damaged_anywhere(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "a.czi", hyperstack(VALUES[:1, :, :1]), compression)
    # The last bytes fill up the metadata: the cuts by 1, 2 and 9 may leave all that is needed.
    assert read_cut_anywhere(path, VALUES[0, :, 0] >> 8, bits=16) <= 3
    damage_is_named(path, "CZI")
