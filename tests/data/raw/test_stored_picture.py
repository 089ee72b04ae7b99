"""Grey of 16 bits and RGB of videos: all levels, and the colours that the file means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from make_media import (
    drifting,
    grey_frames,
    outlined_frames,
    union_of,
    with_display_matrix,
    write_video,
)
from test_lossless_grey import frame_of, write

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.stack import Choices
from dist_train.data.raw.stored_picture import Pixels
from dist_train.data.raw.video import Video
from dist_train.errors import DecodeError

WHOLE = PrepareSettings(roi="none")
LIMITED, FULL = 1, 2
# By name: number of the matrix, weights of red and blue (ITU-R BT.601, BT.709, BT.2020).
MATRICES = {"601": (6, 0.299, 0.114), "709": (1, 0.2126, 0.0722), "2020": (9, 0.2627, 0.0593)}


def pictures(path: Path, pixels: Pixels, bits: int | None = None) -> np.ndarray:
    video = Video(path, bits=bits, pixels=pixels)
    return np.stack([frame.part(slice(None), slice(None)) for frame in video])


def coded(rgb: np.ndarray, matrix: str, bits: int, colour_range: int) -> Sequence[np.ndarray]:
    """Luma, Cb and Cr of RGB from 0 to 1, by the formulas of ITU-R BT.709, 3.2 to 3.4."""
    _, red, blue = MATRICES[matrix]
    r, g, b = np.moveaxis(rgb, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    unit, most = 1 << (bits - 8), (1 << bits) - 1
    if colour_range == LIMITED:
        planes = (luma * 219 + 16) * unit, (cb * 224 + 128) * unit, (cr * 224 + 128) * unit
    else:
        planes = luma * most, cb * most + 128 * unit, cr * most + 128 * unit
    return [np.rint(plane).clip(0, most).astype(np.uint16) for plane in planes]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
@pytest.mark.parametrize(("pix_fmt", "bits"), [("yuv444p", 8), ("yuv444p10le", 10)])
def test_rgb_by_the_files_matrix_and_range(
    tmp_path: Path, matrix: str, colour_range: int, pix_fmt: str, bits: int
) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.random((2, 32, 48, 3))
    # With the corners of the cube, where rounding leads out of it.
    rgb[:, :8] = rng.integers(0, 2, rgb[:, :8].shape)
    frames = []
    for picture in rgb:
        frame = frame_of(pix_fmt, coded(picture, matrix, bits, colour_range), colour_range)
        frame.colorspace = MATRICES[matrix][0]
        frames.append(frame)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = 32, 48, pix_fmt
        stream.codec_context.color_range = colour_range
        stream.codec_context.colorspace = MATRICES[matrix][0]
        for frame in frames:
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    # Half a level of each coded plane.
    most = 2 / (1 << (bits - 8))
    got = pictures(path, "rgb")
    assert got.dtype == np.uint8
    assert np.abs(got - rgb * 255).max() <= most + 0.5
    got = pictures(path, "rgb16")
    assert got.dtype == np.uint16
    assert np.abs(got / 257 - rgb * 255).max() <= most


@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
@pytest.mark.parametrize(
    ("pix_fmt", "bits"),
    [("yuv420p", 8), ("yuv444p", 8), ("yuv420p10le", 10), ("yuv444p12le", 12)],
)
def test_luma_keeps_all_its_levels(
    tmp_path: Path, pix_fmt: str, bits: int, colour_range: int
) -> None:
    values = np.arange(1 << bits, dtype=np.uint16).reshape(-1, 64)
    values = np.pad(values, ((0, max(0, 16 - len(values))), (0, 0)), mode="edge")
    half = tuple(-(-n // 2) if "420" in pix_fmt else n for n in values.shape)
    grey = np.full(half, 1 << (bits - 1), np.uint16)
    frame = frame_of(pix_fmt, [values, grey, grey], colour_range)
    (got,) = pictures(write(tmp_path / "a.mkv", "ffv1", [frame]), "grey16")
    unit = 1 << (bits - 8)
    black, white = (16 * unit, 235 * unit) if colour_range == LIMITED else (0, (1 << bits) - 1)
    expected = ((values.astype(float) - black) / (white - black)).clip(0, 1) * 65535
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, np.rint(expected))
    # No two levels between black and white become one.
    assert len(np.unique(got)) == white - black + 1


def test_a_camera_of_12_bits_in_16(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 12, (16, 24), np.uint16)
    path = write(tmp_path / "a.mkv", "ffv1", [frame_of("gray16le", [values], FULL)])
    expected = np.rint(values * (65535 / 4095))
    np.testing.assert_array_equal(pictures(path, "grey16", bits=12)[0], expected)
    np.testing.assert_array_equal(pictures(path, "rgb16", bits=12)[0, ..., 1], expected)
    with pytest.raises(DecodeError, match="bits 12"):
        pictures(path, "grey16")


def test_rgb_video_gives_its_own_values(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 17, 23, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.avi", frames, codec="rawvideo", pix_fmt="bgr24")
    np.testing.assert_array_equal(pictures(path, "rgb"), frames)
    np.testing.assert_array_equal(pictures(path, "rgb16"), frames * np.uint16(257))
    luma = frames.astype(float) * 257 @ [0.299, 0.587, 0.114]
    assert np.abs(pictures(path, "grey16") - luma).max() < 0.51


def test_a_matrix_that_is_not_known(tmp_path: Path) -> None:
    """YCgCo: its grey is read."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        stream.codec_context.colorspace = 8
        planes = [np.full(size, 90, np.uint8) for size in ((16, 16), (8, 8), (8, 8))]
        frame = frame_of("yuv420p", planes, LIMITED)
        frame.colorspace = 8
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    assert len(pictures(path, "grey")) == 1
    with pytest.raises(DecodeError, match=r"matrix 8.*--channels grey"):
        pictures(path, "rgb")


def test_rgb_is_turned_upright(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", frames, codec="libx264rgb", pix_fmt="rgb24",
                       options={"qp": "0"})  # fmt: skip
    with_display_matrix(path, 0, 1, -1, 0)
    np.testing.assert_array_equal(pictures(path, "rgb"), np.rot90(frames, -1, (1, 2)))


@pytest.mark.parametrize(
    ("channels", "taken"),
    [("auto", None), ("grey", None), ("rgb", (0, 1, 2)), ("all", (0, 1, 2)), ("2", (2,)),
     ("2,0", (2, 0))],
)  # fmt: skip
def test_channels_of_a_clip(tmp_path: Path, channels: str, taken: tuple[int, ...] | None) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 17, 23, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.avi", frames, codec="rawvideo", pix_fmt="bgr24")
    names = ("grey",) if taken is None else tuple(("red", "green", "blue")[n] for n in taken)
    settings = replace(WHOLE, choices=Choices(channels=channels), channel_names=names)
    clip, _ = read_clip(path, "a.avi", "here", settings)
    grey, _ = read_clip(path, "a.avi", "here", WHOLE)
    assert clip.flags.c_contiguous
    expected = grey if taken is None else np.squeeze(frames[..., list(taken)])
    np.testing.assert_array_equal(clip, expected)


def test_a_channel_that_is_not_there(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", grey_frames(2), codec="mpeg4")
    with pytest.raises(DecodeError, match="no channel 3"):
        read_clip(path, "a.avi", "here", replace(WHOLE, choices=Choices(channels="3")))


@pytest.mark.parametrize("step", [(0, 1), (0, 12)])
def test_the_outline_crops_rgb(tmp_path: Path, step: tuple[int, int]) -> None:
    """Also where a box leaves the window that was kept, and the file is decoded again."""
    boxes = [None, *drifting(Box(20, 30, 61, 81), 5, step=step)]
    frames = outlined_frames(boxes, height=96, width=160)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    grey, box = crop_to_outline(Video(path), OutlineColour())
    clip, found = crop_to_outline(Video(path, pixels="rgb"), OutlineColour())
    assert found == box
    assert clip.shape == (*grey.shape, 3)
    np.testing.assert_array_equal(clip, pictures(path, "rgb")[(slice(None), *box.slices)])
    union = union_of(boxes)
    assert abs(box.top - union.top) <= 2


@pytest.mark.parametrize(("number", "name"), [(16, "PQ"), (18, "HLG"), (1, None)])
def test_hdr_is_read_as_it_is_coded(tmp_path: Path, number: int, name: str | None) -> None:
    """No light is mapped; the record tells the transfer function."""
    values = np.arange(1 << 10, dtype=np.uint16).reshape(16, 64)
    grey = np.full((8, 32), 512, np.uint16)
    frame = frame_of("yuv420p10le", [values, grey, grey], LIMITED)
    frame.color_trc, frame.pts = number, 0
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        params = "lossless=1:pools=none:frame-threads=1:log-level=none"
        stream = output.add_stream("libx265", rate=20, options={"x265-params": params})
        stream.height, stream.width, stream.pix_fmt = 16, 64, "yuv420p10le"
        stream.codec_context.color_range = LIMITED
        stream.codec_context.color_trc = number
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    clip, record = read_clip(path, "a.mkv", "here", WHOLE)
    assert record.get("transfer") == name
    expected = np.rint((values - 64.0) * (255 / 876)).clip(0, 255)
    np.testing.assert_array_equal(clip[0], expected)
