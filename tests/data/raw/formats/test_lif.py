"""LIF files, by a writer of our own: Leica's programs are the only other ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lif_writer import image, write_lif
from make_media import read_volume
from raw_files import damage_is_named, read_cut_anywhere, stack_in

from dist_train.data.raw.formats.lif import read
from dist_train.data.raw.stack import RGB, Choices
from dist_train.errors import DecodeError

VALUES = np.random.default_rng(0).integers(0, 1 << 12, (3, 4, 2, 5, 6), np.uint16)
STEPS = {"T": 0.5, "Z": 2e-6, "Y": 0.25e-6, "X": 0.5e-6}


def lif(path: Path, values: np.ndarray, axes: str, **how: Any) -> Path:
    return write_lif(
        path, {"MemBlock_1": (image("one", "MemBlock_1", values, axes, **how), values)}
    )


@pytest.mark.parametrize("order", ["TZC", "CTZ", "ZCT"])
def test_time_depth_and_channels(tmp_path: Path, order: str) -> None:
    values = np.ascontiguousarray(VALUES.transpose([*("TZC".index(a) for a in order), 3, 4]))
    how: dict[str, Any] = {"steps": STEPS, "names": ("Green", "Red"), "bits": 12}
    path = lif(tmp_path / "a.lif", values, f"{order}YX", **how)
    stack, frames = stack_in(path, depth_axis="Z", plane=2)
    np.testing.assert_array_equal(frames, np.moveaxis(VALUES[2], 1, -1))
    assert (stack.channels, stack.bits) == (("Green", "Red"), 12)
    assert stack.spacing == pytest.approx((2.0, 0.25, 0.5))
    stack, frames = stack_in(path, depth_axis="T", plane=3)
    np.testing.assert_array_equal(frames, np.moveaxis(VALUES[:, 3], 1, -1))
    assert (stack.spacing[0], stack.interval) == (None, 0.5)
    with pytest.raises(DecodeError, match="both time and depth"):
        read(path, path, Choices())
    clip = read_volume(path, bits=12, depth_axis="Z", plane=0, channels="1")
    np.testing.assert_array_equal(clip, VALUES[0, :, 1] >> 4)


@pytest.mark.parametrize(("last", "interval"), [(80, 0.04), (90, None)])
def test_time_stamps(tmp_path: Path, last: int, interval: float | None) -> None:
    values = np.ascontiguousarray(VALUES[:, :2, 0])
    stamps = [0, 1, 40, 41, last, last + 1]
    path = lif(tmp_path / "a.lif", values, "TZYX", steps=STEPS, stamps=stamps)
    assert stack_in(path, depth_axis="T", plane=1)[0].interval == interval


@pytest.mark.parametrize("blue_first", [False, True])
def test_colour(tmp_path: Path, blue_first: bool) -> None:
    colours = VALUES[0].astype(np.uint8)[:, [0, 1, 0]].transpose(0, 2, 3, 1) + np.uint8([0, 1, 2])
    stored = np.ascontiguousarray(colours[..., ::-1] if blue_first else colours)
    tags = (3, 2, 1) if blue_first else (1, 2, 3)
    path = lif(tmp_path / "a.lif", stored, "ZYXC", names=("a", "b", "c"), tags=tags)
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, colours)
    assert stack.channels == RGB


def test_images_of_a_project(tmp_path: Path) -> None:
    first, second = VALUES[0, :, 0].copy(), VALUES[1, :3, 1].astype(np.float32)
    images = {
        "a": (image("first", "a", first, "ZYX"), first),
        "b": (image("second", "b", second, "ZYX"), second),
    }
    path = write_lif(tmp_path / "a.lif", images)
    with pytest.raises(DecodeError, match=r"holds 2 series of pictures \(0 first, 1 second\)"):
        read(path, path, Choices())
    for number, values in enumerate((first, second)):
        stack, frames = stack_in(path, series=number)
        np.testing.assert_array_equal(frames, values)
        assert (stack.channels, stack.spacing) == (("grey",), (None, None, None))


def test_other_axes(tmp_path: Path) -> None:
    path = lif(tmp_path / "a.lif", VALUES[0, :, 0].copy(), "MYX")
    with pytest.raises(DecodeError, match="M is neither time nor depth"):
        read(path, path, Choices())
    path = lif(tmp_path / "a.lif", VALUES[0, :, 0].copy(), "YZX")
    with pytest.raises(DecodeError, match=r"frames of other axes than row and column \(YZX\)"):
        read(path, path, Choices())


def test_other_files_of_leica_are_not_opened(tmp_path: Path) -> None:
    """An XLIF file names the files that hold its pixels."""
    frame = '<Frame File="b.tif" Offset="0" Size="30"/>'
    memory = f'<Memory Size="30" MemoryBlockID="a">{frame}</Memory>'
    root = f'<LMSDataContainerHeader Version="2"><Element Name="a">{memory}</Element>'
    path = tmp_path / "a.lif"
    path.write_bytes(b"\xff\xfe" + f"{root}</LMSDataContainerHeader>".encode("utf-16-le"))
    with pytest.raises(DecodeError, match="is no LIF file"):
        read(path, path, Choices())


def test_more_is_declared_than_the_file_holds(tmp_path: Path) -> None:
    huge = np.broadcast_to(np.uint16(7), (1 << 20, 1 << 20, 1 << 10))
    values = VALUES[0, :, 0].copy()
    described = image("one", "a", huge, "ZYX")
    path = write_lif(tmp_path / "a.lif", {"a": (described, values)})
    with pytest.raises(
        DecodeError, match=f"is cut short: {1 << 51} bytes of pixels are declared, 240 are"
    ):
        read(path, path, Choices())


def test_cut_or_damaged_anywhere(tmp_path: Path) -> None:
    values = VALUES[0, :, 0].copy()
    path = lif(tmp_path / "a.lif", values, "ZYX")
    assert read_cut_anywhere(path, values >> 4, bits=12) == 0
    damage_is_named(path, "LIF")
