"""Every kind of video becomes uint8 frames, or an error that names it; never a crash."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import av
import cv2
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
from under_limit import read_under_limit

from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.video import Video
from dist_train.errors import DecodeError

FRAMES = grey_frames()
LUMA = FRAMES[..., 0].astype(int)
NOISE = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)

# Lossless where the codec can be, and the most grey levels that it may then be off.
ENCODINGS = {
    "mp4": ({"options": {"qp": "0"}}, 1),
    "mp4, 4:4:4": ({"options": {"qp": "0"}, "pix_fmt": "yuv444p"}, 1),
    "mp4, full range": ({"options": {"qp": "0"}, "full_range": True}, 1),
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
    "avi": ({"codec": "mpeg4", "options": {"qscale": "2", "flags": "+qscale"}}, 8),
    "avi, motion JPEG": ({"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True}, 8),
    "mkv": ({"codec": "ffv1"}, 1),
    "mkv, 10 bits": ({"codec": "ffv1", "pix_fmt": "yuv420p10le"}, 2),
    "webm": ({"codec": "libvpx-vp9", "options": {"lossless": "1", "cpu-used": "8"}}, 1),
    "gif": ({"codec": "gif", "pix_fmt": "gray"}, 1),
    "gif, colour": ({"codec": "gif", "pix_fmt": "rgb8"}, 48),
    "mpeg": ({"codec": "mpeg1video", "rate": 25}, 12),
}


def check_luma(path: Path, encoding: str, frames: np.ndarray) -> None:
    how, tolerance = ENCODINGS[encoding]
    video = Video(write_video(path, frames, **how), bits=16)
    luma = np.stack([frame.luma for frame in video])
    assert luma.dtype == np.uint8
    assert luma.shape == frames.shape[:3]
    assert np.abs(luma - frames[..., 0].astype(int)).max() <= tolerance
    assert video.frames_decoded == len(frames)
    assert not video.truncated


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_video_luma_is_full_range_grey(tmp_path: Path, encoding: str) -> None:
    check_luma(tmp_path / f"clip.{encoding.split(',')[0]}", encoding, FRAMES)


@pytest.mark.parametrize("encoding", ["mp4", "mkv", "gif", "mpeg"])
def test_one_frame_is_a_clip(tmp_path: Path, encoding: str) -> None:
    check_luma(tmp_path / f"clip.{encoding}", encoding, FRAMES[:1])


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "bgr24", "yuv444p10le"])
def test_colour_becomes_bt601_grey(tmp_path: Path, pix_fmt: str) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    frames = np.kron(colours, np.ones((8, 8, 1), np.uint8))[None]
    how = {"codec": "rawvideo"} if pix_fmt == "bgr24" else {"options": {"qp": "0"}}
    suffix = "avi" if pix_fmt == "bgr24" else "mp4"
    (frame,) = Video(write_video(tmp_path / f"a.{suffix}", frames, pix_fmt=pix_fmt, **how))
    expected = frames[0] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(frame.luma - expected).max() <= 2


@pytest.mark.parametrize("encoding", ["mp4", "mkv", "webm", "avi", "gif"])
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
    """AVI also counts the empty places between frames, and its index is at the end."""
    times = [0, 1, 2, 3, 40, 41, 341, 342]
    path = write_video(tmp_path / "a.avi", FRAMES, codec="mpeg4", rate=100, times=times)
    assert len(list(whole := Video(path))) == whole.frames_declared == 8
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"idx1") - 2000])
    assert 0 < len(list(cut := Video(path))) < 8
    assert cut.truncated


def test_outline_in_10_bits(tmp_path: Path) -> None:
    boxes = drifting(Box(20, 30, 61, 81), 5)
    how, _ = ENCODINGS["mkv, 10 bits"]
    path = write_video(tmp_path / "a.mkv", outlined_frames(boxes), **how)
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


def test_upright_as_opencv_says(tmp_path: Path) -> None:
    path = turned(tmp_path / "a.mp4", "clockwise", FRAMES)
    capture = cv2.VideoCapture(str(path))
    for frame in Video(path):
        there, picture = capture.read()
        assert there
        assert np.abs(frame.luma.astype(int) - picture[..., 1]).max() <= 3
    capture.release()


@pytest.mark.parametrize("matrix", [(0.866, 0.5, -0.5, 0.866), (0, 1, 0, 0)])
def test_other_angles_are_ignored(tmp_path: Path, matrix: tuple[float, ...]) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, options={"qp": "0"})
    plain = np.stack([frame.y for frame in Video(path)])
    with_display_matrix(path, *matrix)
    np.testing.assert_array_equal(np.stack([frame.y for frame in Video(path)]), plain)


def test_iterating_again_decodes_again(tmp_path: Path) -> None:
    """The frames outlive the decoder, whose memory they are."""
    video = Video(write_video(tmp_path / "a.mp4", FRAMES, options={"qp": "0"}, full_range=True))
    for frames in (list(video), list(video)):
        assert np.abs(np.stack([frame.luma for frame in frames]) - LUMA).max() <= 1
    assert video.frames_decoded == video.frames_declared == len(FRAMES)


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


def without_its_header(path: Path) -> None:
    """An mp4 has its header at the end."""
    write_video(path, NOISE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())


NO_VIDEO: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be opened"),
    "text": (lambda path: path.write_bytes(b"garbage"), "cannot be opened"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "(cannot be opened|holds no)"),
    "no header": (without_its_header, "cannot be opened"),
    "sound only": (sound_only, "holds no video stream"),
}


@pytest.mark.parametrize("kind", NO_VIDEO)
def test_not_a_video(tmp_path: Path, kind: str) -> None:
    make, message = NO_VIDEO[kind]
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(DecodeError, match=f"a.mp4: {message}") as raised:
        list(Video(path))
    assert raised.value.where == path


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


@pytest.mark.slow
def test_real_clips_decode_to_their_known_counts(real_data: Path) -> None:
    """Every real file gives the frames that PyAV alone gives; its header may say otherwise."""
    folder = real_data / "lung_ultrasound"
    for path in sorted(p for p in folder.iterdir() if p.suffix != ".csv"):
        with av.open(str(path)) as container:
            expected = sum(1 for _ in container.decode(video=0))
        assert sum(1 for _ in Video(path)) == expected, path.name


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")


@linux
def test_conversion_starts_no_threads(tmp_path: Path) -> None:
    """The stacks of a thread for each core would be the larger part of a worker's memory."""
    path = write_video(tmp_path / "a.mp4", FRAMES, **ENCODINGS["mp4, 10 bits"][0])
    # A stack takes 8 MiB.
    assert read_under_limit(path, 6)[0] == str(len(FRAMES))


@linux
@pytest.mark.parametrize("kind", ["mp4", "mp4, 10 bits", "mp4, HEVC, 10 bits", "webm"])
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
