"""Every kind of file becomes uint8 [D, H, W], or an error that names it; never a crash."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import tifffile
from make_media import FULL_RANGE, grey_frames, write_video

from dist_train.data.decode import Video, read_volume, to_uint8_volume
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
    "mp4, grey": ({"options": {"qp": "0"}, "pix_fmt": "gray", "full_range": True}, 2),
    "mov": ({"options": {"qp": "0"}}, 1),
    "avi": ({"codec": "mpeg4", "options": {"qscale": "2", "flags": "+qscale"}}, 8),
    "avi, motion JPEG": ({"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True}, 8),
    "avi, RGB": ({"codec": "rawvideo", "pix_fmt": "bgr24"}, 1),
    "mkv": ({"codec": "ffv1"}, 1),
    "webm": ({"codec": "libvpx-vp9", "options": {"lossless": "1", "cpu-used": "8"}}, 1),
    "gif": ({"codec": "gif", "pix_fmt": "gray"}, 1),
    "mpeg": ({"codec": "mpeg1video", "rate": 25}, 12),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_video_luma_is_full_range_grey(tmp_path: Path, encoding: str) -> None:
    how, tolerance = ENCODINGS[encoding]
    path = write_video(tmp_path / f"clip.{encoding.split(',')[0]}", FRAMES, **how)
    video = Video(path)
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


@pytest.mark.parametrize(("height", "width"), [(47, 63), (33, 32), (32, 33)])
def test_odd_sizes_keep_every_pixel(tmp_path: Path, height: int, width: int) -> None:
    frames = grey_frames(4, height, width)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    for frame, expected in zip(Video(path), frames[..., 0].astype(int), strict=True):
        assert np.abs(frame.luma - expected).max() <= 1
        assert frame.cb.shape == frame.cr.shape == (-(-height // 2), -(-width // 2))


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


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif"])
def test_16_bits_are_divided_by_257(tmp_path: Path, suffix: str) -> None:
    levels = np.array([0, 256, 257, 32768, 65278, 65535], np.uint16).reshape(1, 2, 3)
    clip = read_volume(save(tmp_path / f"a{suffix}", np.repeat(levels, 4, axis=2)))
    assert clip[0, :, ::4].ravel().tolist() == [0, 0, 1, 127, 254, 255]


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_big_endian(tmp_path: Path, suffix: str) -> None:
    array = (VOLUME.astype(np.uint16) * 257).astype(">u2")
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        tifffile.imwrite(path, array, byteorder=">", photometric="minisblack")
    np.testing.assert_array_equal(read_volume(path), VOLUME)


def test_every_uint8_level_survives_16_bits() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(to_uint8_volume(levels.astype(np.uint16) * 257, "x"), levels)


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
