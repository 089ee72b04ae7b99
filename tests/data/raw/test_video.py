"""Every kind of file becomes uint8 [D, H, W], or an error that names it; never a crash."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import tifffile
from helpers import ROOT, environment
from make_media import (
    FULL_RANGE,
    drifting,
    grey_frames,
    outlined_frames,
    read_volume,
    union_of,
    with_display_matrix,
    write_video,
)

from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.video import Video
from dist_train.data.raw.volume_file import to_uint8_volume
from dist_train.errors import DecodeError

FRAMES = grey_frames()
LUMA = FRAMES[..., 0].astype(int)
NOISE = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)

# Lossless where the codec can be, and the most grey levels that it may then be off.
ENCODINGS = {
    "mp4": ({"options": {"qp": "0"}}, 1),
    "mp4, 4:4:4": ({"options": {"qp": "0"}, "pix_fmt": "yuv444p"}, 1),
    "mp4, full range": ({"options": {"qp": "0"}, "full_range": True}, 1),
    "mp4, 4:4:4, full range": (
        {"options": {"qp": "0"}, "pix_fmt": "yuv444p", "full_range": True},
        1,
    ),
    "mp4, 10 bits": ({"options": {"qp": "0"}, "pix_fmt": "yuv420p10le"}, 2),
    "mp4, HEVC, 10 bits": (
        {
            "codec": "libx265",
            "options": {"x265-params": "lossless=1:pools=none:frame-threads=1:log-level=none"},
            "pix_fmt": "yuv420p10le",
        },
        2,
    ),
    "mov, ProRes, 10 bits": ({"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, 4),
    "mkv, 10 bits": ({"codec": "ffv1", "pix_fmt": "yuv420p10le"}, 2),
    "mkv, 16 bits of grey": ({"codec": "ffv1", "pix_fmt": "gray16le", "full_range": True}, 2),
    "mp4, grey": ({"options": {"qp": "0"}, "pix_fmt": "gray", "full_range": True}, 2),
    "mov": ({"options": {"qp": "0"}}, 1),
    "avi": ({"codec": "mpeg4", "options": {"qscale": "2", "flags": "+qscale"}}, 8),
    "avi, motion JPEG": ({"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True}, 8),
    "avi, RGB": ({"codec": "rawvideo", "pix_fmt": "bgr24"}, 1),
    "mkv": ({"codec": "ffv1"}, 1),
    "webm": ({"codec": "libvpx-vp9", "options": {"lossless": "1", "cpu-used": "8"}}, 1),
    "gif": ({"codec": "gif", "pix_fmt": "gray"}, 1),
    "gif, colour": ({"codec": "gif", "pix_fmt": "rgb8"}, 48),
    "mpeg": ({"codec": "mpeg1video", "rate": 25}, 12),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_video_luma_is_full_range_grey(tmp_path: Path, encoding: str) -> None:
    how, tolerance = ENCODINGS[encoding]
    path = write_video(tmp_path / f"clip.{encoding.split(',')[0]}", FRAMES, **how)
    video = Video(path, bits=16)
    luma = np.stack([frame.luma for frame in video])
    assert luma.dtype == np.uint8
    assert luma.shape == LUMA.shape
    assert np.abs(luma - LUMA).max() <= tolerance
    assert video.frames_decoded == len(FRAMES)
    assert video.stopped_by is None
    assert not video.truncated


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_luma_equals_the_grey_of_pyav(tmp_path: Path, pix_fmt: str, full_range: bool) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, pix_fmt=pix_fmt, full_range=full_range)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert (frames[0].color_range == FULL_RANGE) == full_range
    expected = np.stack([frame.to_ndarray(format="gray") for frame in frames]).astype(int)
    luma = np.stack([frame.luma for frame in Video(path)])
    assert np.abs(luma - expected).max() <= 2


@pytest.mark.parametrize("kind", ["mkv", "webm", "gif", "avi, RGB", "mkv, 10 bits"])
@pytest.mark.parametrize(("height", "width"), [(47, 63), (33, 32), (32, 33)])
def test_odd_sizes_keep_every_pixel(tmp_path: Path, kind: str, height: int, width: int) -> None:
    frames = grey_frames(4, height, width)
    how, tolerance = ENCODINGS[kind]
    path = write_video(tmp_path / f"a.{kind.split(',')[0]}", frames, **how)
    for frame, expected in zip(Video(path), frames[..., 0].astype(int), strict=True):
        assert np.abs(frame.luma - expected).max() <= tolerance
        assert frame.cb.shape == frame.cr.shape == (-(-height // 2), -(-width // 2))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_frame_is_a_clip(tmp_path: Path, encoding: str) -> None:
    how, tolerance = ENCODINGS[encoding]
    path = write_video(tmp_path / f"a.{encoding.split(',')[0]}", FRAMES[:1], **how)
    video = Video(path, bits=16)
    (frame,) = video
    assert np.abs(frame.luma - LUMA[0]).max() <= tolerance
    assert not video.truncated


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "bgr24", "yuv444p10le"])
def test_colour_becomes_bt601_grey(tmp_path: Path, pix_fmt: str) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    frames = np.kron(colours, np.ones((8, 8, 1), np.uint8))[None]
    how = {"codec": "rawvideo"} if pix_fmt == "bgr24" else {"options": {"qp": "0"}}
    suffix = "avi" if pix_fmt == "bgr24" else "mp4"
    (frame,) = Video(write_video(tmp_path / f"a.{suffix}", frames, pix_fmt=pix_fmt, **how))
    expected = frames[0] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(frame.luma - expected).max() <= 2


@pytest.mark.parametrize("encoding", ["mp4", "mp4, HEVC, 10 bits", "mkv", "webm", "avi", "gif"])
def test_every_frame_comes_once_whatever_its_time(tmp_path: Path, encoding: str) -> None:
    """Gaps are not filled by doubles, and what a player would skip is not dropped."""
    how, tolerance = ENCODINGS[encoding]
    # In 1/100 s: four within the time of one frame, then a pause of three seconds.
    times = [0, 1, 2, 3, 40, 41, 341, 342]
    suffix = encoding.split(",")[0]
    path = write_video(tmp_path / f"a.{suffix}", FRAMES, times=times, **{**how, "rate": 100})
    video = Video(path)
    luma = np.stack([frame.luma for frame in video])
    assert luma.shape == LUMA.shape
    assert np.abs(luma - LUMA).max() <= tolerance
    assert not video.truncated


def test_cut_avi_with_dropped_frames_is_truncated(tmp_path: Path) -> None:
    """AVI counts the empty places between frames, too, and its index is at the end."""
    times = [0, 1, 2, 3, 40, 41, 341, 342]
    path = write_video(tmp_path / "a.avi", FRAMES, codec="mpeg4", rate=100, times=times)
    assert len(list(whole := Video(path))) == whole.frames_declared == 8
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"idx1") - 2000])
    assert 0 < len(list(cut := Video(path))) < 8
    assert cut.truncated


@pytest.mark.parametrize("encoding", ["mp4, 10 bits", "mp4, HEVC, 10 bits", "mkv, 10 bits"])
def test_outline_in_10_bits(tmp_path: Path, encoding: str) -> None:
    boxes = drifting(Box(20, 30, 61, 81), 5)
    how, _ = ENCODINGS[encoding]
    path = write_video(tmp_path / f"a.{encoding[:3]}", outlined_frames(boxes), **how)
    _, found = crop_to_outline(Video(path), OutlineColour())
    for got, true in zip(found.slices, union_of(boxes).slices, strict=True):
        assert abs(got.start - true.start) <= 2
        assert abs(got.stop - true.stop) <= 2


# What a player does to a picture, and the (a, b, c, d) of ISO/IEC 14496-12 that ask for it.
TURNS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "none": ((1, 0, 0, 1), lambda x: x),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirror": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transpose": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "transverse": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}
# Of an even and of an odd size, no two corners alike.
CORNERS = {(48, 64): "libx264", (47, 63): "ffv1"}


def turned(path: Path, turn: str, frames: np.ndarray, codec: str = "libx264") -> Path:
    how = {"options": {"qp": "0"}} if codec == "libx264" else {}
    return with_display_matrix(write_video(path, frames, codec=codec, **how), *TURNS[turn][0])


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("size", CORNERS)
def test_frames_are_upright(tmp_path: Path, turn: str, size: tuple[int, int]) -> None:
    # One colour to each 2x2 block, or what an odd size leaves of it, so that chroma is exact.
    blocks = np.random.default_rng(0).integers(40, 200, (2, 24, 32, 3), dtype=np.uint8)
    frames = np.kron(blocks, np.ones((1, 2, 2, 1), np.uint8))[:, : size[0], : size[1]]
    codec = CORNERS[size]
    plain = list(Video(turned(tmp_path / "plain.mp4", "none", frames, codec)))
    upright = list(Video(turned(tmp_path / "turned.mp4", turn, frames, codec)))
    way = TURNS[turn][1]
    for before, after in zip(plain, upright, strict=True):
        for plane in ("y", "cb", "cr"):
            got = getattr(after, plane)
            np.testing.assert_array_equal(got, way(getattr(before, plane)))
            assert got.strides[1] == 1
            assert not got.flags.writeable
        assert (after.full_range, after.bt709) == (before.full_range, before.bt709)
        height, width = after.y.shape
        assert after.cb.shape == after.cr.shape == (-(-height // 2), -(-width // 2))


@pytest.mark.parametrize("turn", ["clockwise", "half", "counterclockwise"])
def test_upright_as_opencv_says(tmp_path: Path, turn: str) -> None:
    path = turned(tmp_path / "a.mp4", turn, FRAMES)
    capture = cv2.VideoCapture(str(path))
    for frame in Video(path):
        there, picture = capture.read()
        assert there
        assert np.abs(frame.luma.astype(int) - picture[..., 1]).max() <= 3
    capture.release()


@pytest.mark.parametrize("turn", ["clockwise", "transverse"])
def test_outline_of_a_turned_video(tmp_path: Path, turn: str) -> None:
    boxes = drifting(Box(20, 30, 61, 81), 4)
    path = turned(tmp_path / "a.mp4", turn, outlined_frames(boxes))
    clip, found = crop_to_outline(Video(path), OutlineColour())
    inside = np.zeros((96, 128), bool)
    inside[union_of(boxes).slices] = True
    rows, columns = np.nonzero(TURNS[turn][1](inside))
    expected = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    got = found.top, found.left, found.bottom, found.right
    assert np.abs(np.subtract(got, expected)).max() <= 2
    luma = np.stack([frame.luma[found.slices] for frame in Video(path)])
    np.testing.assert_array_equal(clip, luma)


@pytest.mark.parametrize("matrix", [(0.866, 0.5, -0.5, 0.866), (0, 0, 0, 0), (0, 1, 0, 0)])
def test_other_angles_are_ignored(tmp_path: Path, matrix: tuple[float, ...]) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, options={"qp": "0"})
    plain = np.stack([frame.y for frame in Video(path)])
    with_display_matrix(path, *matrix)
    np.testing.assert_array_equal(np.stack([frame.y for frame in Video(path)]), plain)


def test_messages_name_where_the_file_is(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.npy", "a.tif"):
        path = tmp_path / name
        path.write_bytes(b"garbage")
        where = f"s3://bucket/{name}"
        with pytest.raises(DecodeError) as raised:
            list(Video(path, where)) if name == "a.mp4" else read_volume(path, where)
        assert raised.value.where == where
        assert str(tmp_path) not in str(raised.value)


def test_iterating_again_decodes_again(tmp_path: Path) -> None:
    video = Video(write_video(tmp_path / "a.mp4", FRAMES))
    first, second = (np.stack([frame.luma for frame in video]) for _ in range(2))
    assert (first == second).all()
    assert video.frames_decoded == video.frames_declared == len(FRAMES)


def test_frames_outlive_the_decoder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, options={"qp": "0"}, full_range=True)
    kept = list(Video(path))
    assert np.abs(np.stack([frame.luma for frame in kept]) - LUMA).max() <= 1


@pytest.mark.parametrize("full_range", [False, True])
def test_part_of_the_grey(tmp_path: Path, full_range: bool) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, full_range=full_range)
    for frame in Video(path):
        assert frame.full_range == full_range
        part = frame.grey(slice(3, 20), slice(5, 64))
        np.testing.assert_array_equal(part, frame.luma[3:20, 5:64])
        part[:] = 0
        assert frame.luma[3:20, 5:64].any()
        with pytest.raises(ValueError, match="read-only"):
            frame.y[0, 0] = 0


@pytest.mark.parametrize("kept", [0.5, 0.8])
def test_cut_faststart_mp4_is_truncated(tmp_path: Path, kept: float) -> None:
    path = write_video(
        tmp_path / "a.mp4",
        NOISE,
        options={"g": "1"},
        container_options={"movflags": "faststart"},
    )
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    video = Video(path)
    decoded = sum(1 for _ in video)
    assert video.truncated
    assert video.frames_declared == 12
    assert 0 < decoded == video.frames_decoded < 12


def test_cut_mp4_with_its_header_at_the_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", NOISE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DecodeError, match=r"a.mp4: cannot be opened") as raised:
        list(Video(path))
    assert raised.value.where == path


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(5000)], ids=["empty", "text", "zeros"])
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"a.mp4: (cannot be opened|holds no)"):
        list(Video(path))


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(DecodeError, match="holds no video stream"):
        list(Video(path))


def test_frames_that_change_size(tmp_path: Path) -> None:
    parts = [
        write_video(
            tmp_path / f"{size[0]}.m2v",
            grey_frames(4, *size),
            codec="mpeg2video",
            rate=25,
            container="mpeg2video",
        ).read_bytes()
        for size in ((48, 64), (64, 96))
    ]
    path = tmp_path / "a.mpg"
    path.write_bytes(b"".join(parts))
    with pytest.raises(DecodeError, match=r"changes size at frame \d+, from 64x48 to 96x64"):
        list(Video(path))


def test_metadata_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "TITLETITLE"
        stream = output.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(FRAMES[0], format="rgb24")))
        output.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b"TITLETITLE") == 1
    path.write_bytes(content.replace(b"TITLETITLE", b"\xe9\xff\xfe\xe9\xff\xfe\xe9\xff\xfe\xe9"))
    assert len(list(Video(path))) == 1


def test_playlist_in_disguise_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(DecodeError):
        list(Video(path))


VOLUME = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, only=array)
    else:
        rgb = array.shape[-1] in (3, 4)
        tifffile.imwrite(path, array, photometric="rgb" if rgb else "minisblack")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif", ".tiff", ".NPY", ".TIF"])
def test_uint8_volume_is_kept(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix.lower()}", VOLUME).rename(tmp_path / f"b{suffix}")
    clip = read_volume(path)
    assert clip.dtype == np.uint8
    assert clip.flags.c_contiguous
    np.testing.assert_array_equal(clip, VOLUME)


def test_kind_is_told_apart_from_the_path(tmp_path: Path) -> None:
    for suffix in (".npz", ".TIFF"):
        path = save(tmp_path / f"a{suffix.lower()}", VOLUME).rename(tmp_path / "nameless")
        np.testing.assert_array_equal(read_volume(path, suffix=suffix), VOLUME)


def ome_tiff(path: Path, array: np.ndarray, axes: str, more: str = "") -> Path:
    """Pages that the OME metadata say are in the file of this name, and ``more`` of such."""
    tifffile.imwrite(path, array, ome=True, metadata={"axes": axes})
    whole = tifffile.tiffcomment(path)
    start, end = whole.index("<TiffData"), whole.index("</Pixels>")
    pages = f'<TiffData PlaneCount="{array[..., 0, 0].size}"><UUID FileName="{path.name}">'
    comment = f"{whole[:start]}{pages}urn:uuid:1</UUID></TiffData>{more}{whole[end:]}"
    # Without a UUID of its own, the file is known by its name alone.
    tifffile.tiffcomment(path, re.sub(r' UUID="[^"]*"', "", comment))
    return path


def test_ome_tiff_opens_no_other_file(tmp_path: Path) -> None:
    """OME-TIFF may spread a volume over files, by names that lead anywhere."""
    tifffile.imwrite(tmp_path / "b.tif", np.full((2, 8, 9), 2, np.uint8), photometric="minisblack")
    other = (
        '<TiffData FirstC="1" PlaneCount="2"><UUID FileName="b.tif">urn:uuid:2</UUID></TiffData>'
    )
    path = ome_tiff(tmp_path / "a.ome.tif", np.full((2, 8, 9), 1, np.uint8), "ZYX", other)
    tifffile.tiffcomment(path, tifffile.tiffcomment(path).replace('SizeC="1"', 'SizeC="2"'))
    assert 2 in tifffile.imread(path)
    with pytest.raises(DecodeError, match="is one file of an OME set"):
        read_volume(path)


def test_ome_tiff_is_read_alike_under_another_name(tmp_path: Path) -> None:
    """Its metadata name the file: taken for another one, two channels would pass for depth."""
    path = ome_tiff(tmp_path / "a.ome.tif", np.zeros((3, 2, 8, 9), np.uint8), "ZCYX")
    copy = tmp_path / "nameless"
    copy.write_bytes(path.read_bytes())
    for place, where in ((path, None), (copy, "s3://bucket/a.ome.tif")):
        with pytest.raises(DecodeError, match=r"has the axes ZCYX of \[3, 2, 8, 9\]"):
            read_volume(place, where, ".tif")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif"])
def test_of_16_bits_the_highest_8_are_kept(tmp_path: Path, suffix: str) -> None:
    levels = np.array([0, 255, 256, 32768, 65279, 65535], np.uint16).reshape(1, 2, 3)
    clip = read_volume(save(tmp_path / f"a{suffix}", np.repeat(levels, 4, axis=2)), bits=16)
    assert clip[0, :, ::4].ravel().tolist() == [0, 0, 1, 128, 254, 255]


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd", "packbits"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", VOLUME, photometric="minisblack", compression=compression)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif"), VOLUME)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_big_endian(tmp_path: Path, suffix: str) -> None:
    array = (VOLUME.astype(np.uint16) * 257).astype(">u2")
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        tifffile.imwrite(path, array, byteorder=">", photometric="minisblack")
    np.testing.assert_array_equal(read_volume(path, bits=16), VOLUME)


def test_every_uint8_level_survives_16_bits() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(to_uint8_volume(levels.astype(np.uint16) * 257, "x", 16), levels)


def test_bool_is_black_and_white() -> None:
    assert to_uint8_volume(VOLUME > 127, "x").tolist() == ((VOLUME > 127) * 255).tolist()


def test_rgb_tiff_becomes_luma(tmp_path: Path) -> None:
    array = np.zeros((2, 8, 8, 3), np.uint8)
    array[0], array[1, ..., 0] = (10, 20, 30), 255
    clip = read_volume(save(tmp_path / "a.tif", array))
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


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int64, np.complex64])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(DecodeError, match=f"holds {np.dtype(dtype)} values.*Use uint8"):
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


def test_npz_of_two_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=VOLUME, b=VOLUME)
    with pytest.raises(DecodeError, match="holds 2 arrays, one is needed"):
        read_volume(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif"])
def test_cut_anywhere_is_a_clean_error(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", VOLUME)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        try:
            clip = read_volume(path)
        except DecodeError:
            continue
        # tifffile reads a stack whose last bytes are metadata.
        assert suffix == ".tif"
        assert clip.dtype == np.uint8


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif"])
def test_damaged_anywhere_is_never_a_crash(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", VOLUME)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, min(len(whole), 240), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            read_volume(path)
        except DecodeError:
            refused += 1
    assert refused > 5


def test_npz_without_arrays(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("readme.txt", "no array")
    (tmp_path / "a.npz").write_bytes(content.getvalue())
    with pytest.raises(DecodeError):
        read_volume(tmp_path / "a.npz")


def test_missing_volume(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"a.npy: cannot be read \(No such file"):
        read_volume(tmp_path / "a.npy")


@pytest.mark.slow
def test_real_clips_decode_to_their_known_counts(real_data: Path) -> None:
    """Every real file gives the frames that PyAV alone gives; its header may say otherwise."""
    folder = real_data / "lung_ultrasound"
    for path in sorted(p for p in folder.iterdir() if p.suffix != ".csv"):
        with av.open(str(path)) as container:
            expected = sum(1 for _ in container.decode(video=0))
        assert sum(1 for _ in Video(path)) == expected, path.name


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


def large_gif(path: Path, width: int, height: int) -> bytes:
    write_video(path, FRAMES[:2], codec="gif", pix_fmt="gray")
    before, after = struct.pack("<HH", 64, 48), struct.pack("<HH", width, height)
    return patched(path, before, after)


def large_jpeg(path: Path, width: int, height: int) -> bytes:
    write_video(path, FRAMES[:2], codec="mjpeg", pix_fmt="yuvj420p", full_range=True)
    start = b"\xff\xc0\x00\x11\x08"
    before, after = struct.pack(">HH", 48, 64), struct.pack(">HH", height, width)
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


BOMBS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "65535x65535.gif": (lambda path: large_gif(path, 65535, 65535), ""),
    "16000x16000.gif": (lambda path: large_gif(path, 16000, 16000), "takes more memory"),
    "65535x65535.avi": (lambda path: large_jpeg(path, 65535, 65535), ""),
    "large.tif": (large_tiff, "takes more memory"),
    "deflated.tif": (deflated_tiff, "takes more memory"),
    "10 TB.npy": (lambda _: declaring((10**6, 10**6, 10), 1000), "declares 1" + "0" * 13),
    "10 TB.npz": (lambda _: zipped(declaring((10**6, 10**6, 10), 1000)), "declares 1" + "0" * 13),
    "deflated.npz": (lambda _: zipped(declaring((200, 1024, 1024), 200 << 20)), "takes more memo"),
}
# Reads a file under a limit of memory, and prints what was said and how much was taken (MiB).
UNDER_LIMIT = """
import resource, sys
from pathlib import Path
from dist_train.data.raw.video import Video
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES, read_raw
from dist_train.errors import DecodeError

def taken(kind):
    return int(Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0]) << 10

path, before = Path(sys.argv[1]), taken("VmHWM")
limit = taken("VmData") + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    if path.suffix in VOLUME_SUFFIXES:
        read_raw(path, path)
    else:
        print(sum(1 for _ in Video(path)))
except DecodeError as error:
    print(error)
print(taken("VmHWM") - before >> 20)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")


def read_under_limit(path: Path, limit: int) -> tuple[str, int]:
    """What reading says in a process that may take ``limit`` MiB more, and how many it took."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_LIMIT, str(path), str(limit)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said, took = done.stdout.splitlines()
    return said, int(took)


@linux
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_the_limit(tmp_path: Path, name: str) -> None:
    make, message = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(make(path))
    assert path.stat().st_size < 1 << 20
    said, took = read_under_limit(path, 100)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert took <= 100


@linux
def test_conversion_starts_no_threads(tmp_path: Path) -> None:
    """The stacks of a thread for each core would be the larger part of a worker's memory."""
    path = write_video(tmp_path / "a.mp4", FRAMES, **ENCODINGS["mp4, 10 bits"][0])
    # A stack takes 8 MiB.
    assert read_under_limit(path, 6)[0] == str(len(FRAMES))


@linux
@pytest.mark.parametrize("kind", ["mp4", "mp4, 10 bits", "mp4, HEVC, 10 bits", "avi", "webm"])
def test_lack_of_memory_is_not_the_files_damage(tmp_path: Path, kind: str) -> None:
    """Some decoders say 'invalid data' then; kept as truncated, the clip would lose its rest."""
    path = tmp_path / f"a.{kind.split(',')[0]}"
    coarse = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    write_video(path, np.kron(coarse, np.ones((1, 32, 32, 1), np.uint8)), **ENCODINGS[kind][0])
    said = {limit: read_under_limit(path, limit)[0] for limit in (1, 4, 10, 200)}
    assert "takes more memory" in said[1]
    assert "takes more memory" in said[4] or said[4] == "3"
    assert "takes more memory" in said[10] or said[10] == "3"
    assert said[200] == "3"
