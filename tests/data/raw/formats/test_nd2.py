"""ND2 files, by a writer of our own: NIS-Elements is the only other one."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from make_media import read_volume
from nd2_writer import write_nd2
from raw_files import damage_is_named, read_cut_anywhere, stack_in

from dist_train.data.raw.formats.nd2 import read
from dist_train.data.raw.stack import RGB, Choices
from dist_train.errors import DecodeError

SAMPLES = Path(__file__).parent / "samples"
VALUES = np.random.default_rng(0).integers(0, 1 << 12, (2, 3, 4, 5, 6, 2), np.uint16)
LOOPS = [("T", 2), ("P", 3), ("Z", 4)]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("padding", [0, 4])
def test_time_depth_positions_and_channels(tmp_path: Path, compressed: bool, padding: int) -> None:
    path = write_nd2(
        tmp_path / "a.nd2",
        VALUES.reshape(24, 5, 6, 2),
        LOOPS,
        names=("DAPI", ""),
        bits=12,
        compressed=compressed,
        padding=padding,
        pixel=0.25,
        step=1.5,
        times=np.repeat([0, 40.0], 12),
    )
    stack, frames = stack_in(path, depth_axis="T", plane=1, series=2)
    np.testing.assert_array_equal(frames, VALUES[:, 2, 1])
    assert (stack.channels, stack.bits) == (("DAPI", "channel 1"), 12)
    assert (stack.spacing, stack.interval) == ((None, 0.25, 0.25), 0.04)
    stack, frames = stack_in(path, depth_axis="Z", plane=1, series=0)
    np.testing.assert_array_equal(frames, VALUES[1, 0])
    assert (stack.spacing, stack.interval) == ((1.5, 0.25, 0.25), None)
    with pytest.raises(DecodeError, match=r"3 series of pictures \(0 well 0, 1 well 1"):
        read(path, path, Choices())
    with pytest.raises(DecodeError, match="both time and depth"):
        read(path, path, Choices(series=0))
    clip = read_volume(path, bits=12, depth_axis="Z", plane=1, series=0, channels="1")
    np.testing.assert_array_equal(clip, VALUES[1, 0, ..., 1] >> 4)


@pytest.mark.parametrize(
    ("times", "interval"),
    [([0, 10, 20, 30], 0.01), ([0, 10, 20, 31], None), (None, 0.05)],
)
def test_interval(tmp_path: Path, times: list[float] | None, interval: float | None) -> None:
    frames = VALUES[0, 0, ..., :1]
    path = write_nd2(tmp_path / "a.nd2", frames, [("T", 4)], period=50.0, times=times)
    stack, values = stack_in(path)
    np.testing.assert_array_equal(values, frames[..., 0])
    assert (stack.interval, stack.spacing) == (interval, (None, None, None))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_one_picture_of_each_type(tmp_path: Path, dtype: type) -> None:
    picture = VALUES[0, 0, :1, ..., :1].astype(dtype)
    stack, frames = stack_in(write_nd2(tmp_path / "a.nd2", picture))
    np.testing.assert_array_equal(frames, picture[..., 0])
    assert stack.channels == ("grey",)


def test_colour_is_stored_blue_first(tmp_path: Path) -> None:
    colours = VALUES[0, 0, :2].astype(np.uint8)[..., [0, 1, 0]] + np.arange(3, dtype=np.uint8)
    path = write_nd2(tmp_path / "a.nd2", colours, [("Z", 2)], colours=True)
    stack, frames = stack_in(path)
    np.testing.assert_array_equal(frames, colours[..., ::-1])
    assert stack.channels == RGB


def test_a_file_of_nis_elements(tmp_path: Path) -> None:
    """Names, sizes and times are those that Bio-Formats gives for it, as PIMS's own tests say."""
    content = lzma.decompress((SAMPLES / "cluster.nd2.xz").read_bytes())
    path = tmp_path / "cluster.nd2"
    path.write_bytes(content)
    stack, frames = stack_in(path, depth_axis="Z", plane=1)
    assert stack.channels == ("5-FAM/pH 9.0", "FM 4-64/2% CHAPS")
    assert (frames.shape, stack.bits) == ((10, 31, 38, 2), 12)
    assert stack.spacing == pytest.approx((0.5, 0.167808983, 0.167808983))
    # The pixels follow the chunk's header of 4096 bytes with a time stamp of 8 at its end.
    for z in range(10):
        at = content.index(b"ImageDataSeq|%d!" % (10 + z)) - 16 + 4096
        raw = np.frombuffer(content, "<u2", 31 * 38 * 2, at).reshape(31, 38, 2)
        np.testing.assert_array_equal(frames[z], raw)
    stack, _ = stack_in(path, depth_axis="T", plane=0)
    assert stack.interval == pytest.approx((21.740178 - 0.445083) / 2, rel=1e-3)


def test_a_missing_frame(tmp_path: Path) -> None:
    """nd2 gives zeros."""
    frames = VALUES[0, 0, ..., :1]
    path = write_nd2(tmp_path / "a.nd2", frames, [("T", 4)], leave=[2])
    with pytest.raises(DecodeError, match="frame 2 of 4 is not there"):
        read(path, path, Choices())


def test_frames_without_loops(tmp_path: Path) -> None:
    path = write_nd2(tmp_path / "a.nd2", VALUES[0, 0, ..., :1])
    with pytest.raises(DecodeError, match="declares 4 frames, its loops 1"):
        read(path, path, Choices())


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_or_damaged_anywhere(tmp_path: Path, compressed: bool) -> None:
    frames = VALUES[0, 0, ..., :1]
    path = write_nd2(tmp_path / "a.nd2", frames, [("Z", 4)], compressed=compressed)
    assert read_cut_anywhere(path, frames[..., 0] >> 4, bits=12) == 0
    damage_is_named(path, "ND2")
