"""Grey that was written without loss comes back without loss, at all 256 levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from dist_train.data.raw.video import Video
from dist_train.errors import DecodeError

UNKNOWN, LIMITED, FULL = 0, 1, 2
LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
# Codecs that keep every value, with the container and the pixel formats of grey that they take.
CODECS = {
    "ffv1": ("mkv", ["gray", "gray9le", "gray10le", "gray12le", "gray14le", "ya8", "bgr0", "bgra"]),
    "ffv1, planar": ("mkv", ["gbrp9le", "gbrp10le", "gbrp12le", "gbrp14le"]),
    "ffvhuff": ("avi", ["gray", "gbrp", "gbrp10le", "rgb24", "bgra"]),
    "huffyuv": ("avi", ["rgb24", "bgra"]),
    "rawvideo": ("avi", ["gray", "bgr24"]),
    "rawvideo, mov": ("mov", ["rgb24", "argb", "gray"]),
    "rawvideo, mkv": ("mkv", ["gray"]),
    "png": ("mov", ["gray", "rgb24", "rgba", "ya8"]),
    "png, avi": ("avi", ["gray", "rgb24"]),
    # PyAV does not know all side data of its frames.
    "tiff": ("mov", ["gray", "rgb24"]),
    "qtrle": ("mov", ["rgb24", "argb"]),
    "magicyuv": ("avi", ["gray", "gbrp"]),
    "utvideo": ("avi", ["gbrp"]),
    "jpegls": ("avi", ["gray", "bgr24"]),
    "gif": ("gif", ["gray"]),
    "libx264": ("mp4", ["gray", "gray10le"]),
    "libx265": ("mp4", ["gray", "gray10le", "gray12le"]),
    "libx264rgb": ("mp4", ["rgb24", "bgr0"]),
    "libvpx-vp9": ("webm", ["gbrp"]),
    "zmbv": ("avi", ["bgr0"]),
}
OPTIONS = {
    "libx265": {"x265-params": "lossless=1:pools=none:frame-threads=1:log-level=none"},
    "libx264": {"qp": "0"},
    "libx264rgb": {"qp": "0"},
    "libvpx-vp9": {"lossless": "1", "cpu-used": "8"},
}


def frame_of(pix_fmt: str, planes: Sequence[np.ndarray], colour_range: int) -> av.VideoFrame:
    """A frame of coded values, [H, W * samples] for each plane, without conversion by FFmpeg."""
    height, width = planes[0].shape
    samples = sum(c.plane == 0 for c in av.VideoFormat(pix_fmt, 16, 16).components)
    frame = av.VideoFrame(width // (4 if pix_fmt == "bgr0" else samples), height, pix_fmt)
    frame.color_range = colour_range
    dtype = np.dtype("<u2" if frame.format.components[0].bits > 8 else np.uint8)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    return frame


def grey_frame(pix_fmt: str, picture: np.ndarray, colour_range: int) -> av.VideoFrame:
    """Equal values of all samples, filled up with their own highest bits, as full range needs."""
    components = av.VideoFormat(pix_fmt, 16, 16).components
    bits = components[0].bits
    values = picture.astype(np.uint16)
    values = values if bits == 8 else (values << (bits - 8)) | (values >> (16 - bits))
    samples = Counter(component.plane for component in components)
    samples = Counter({0: 4}) if pix_fmt == "bgr0" else samples
    planes = [np.repeat(values, samples[plane], axis=1) for plane in sorted(samples)]
    return frame_of(pix_fmt, planes, colour_range)


def write(path: Path, codec: str, frames: Sequence[av.VideoFrame], **how: str) -> Path:
    with av.open(str(path), "w", options=how) as output:
        stream = output.add_stream(codec, rate=20, options=OPTIONS.get(codec, {}))
        stream.height, stream.width = frames[0].height, frames[0].width
        stream.pix_fmt = frames[0].format.name
        stream.codec_context.color_range = frames[0].color_range
        for frame in frames:
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def luma_of(path: Path) -> np.ndarray:
    return np.stack([frame.luma for frame in Video(path)])


# Odd and even sizes, for what is split in halves, and no two pictures alike.
PICTURES = np.stack([np.pad(np.roll(LEVELS, t, axis=0), ((0, 3), (0, 1))) for t in range(3)])


@pytest.mark.parametrize("codec", CODECS)
def test_every_level_is_kept(tmp_path: Path, codec: str) -> None:
    """Whatever range the file says: FFmpeg knows grey and RGB in full range alone.

    Grey H.264 is decoded as 4:2:0, which has two ranges, and full range must be told.
    """
    suffix, formats = CODECS[codec]
    name = codec.split(",")[0]
    pictures = PICTURES if codec in ("ffv1", "png", "huffyuv", "gif") else PICTURES[:, :16, :16]
    ranges = (UNKNOWN, LIMITED, FULL) if codec in ("ffv1", "png") else (FULL,)
    if name == "libx265":
        # Its smallest picture.
        pictures = np.tile(pictures, (1, 4, 4))
    for pix_fmt in formats:
        for colour_range in ranges:
            frames = [grey_frame(pix_fmt, picture, colour_range) for picture in pictures]
            luma = luma_of(write(tmp_path / f"{pix_fmt}{colour_range}.{suffix}", name, frames))
            np.testing.assert_array_equal(luma, pictures, err_msg=f"{pix_fmt} {colour_range}")


def with_tag(path: Path, tag: bytes) -> Path:
    """Write another code of the format into both headers of an AVI."""
    content = bytearray(path.read_bytes())
    for place in (content.index(b"vids") + 4, content.index(b"strf") + 24):
        content[place : place + 4] = tag
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("width", [16, 17, 18])
@pytest.mark.parametrize("tag", [b"Y800", b"GREY", b"Y8  "])
def test_raw_grey_of_cameras(tmp_path: Path, tag: bytes, width: int) -> None:
    """The first row comes first, and rows are not filled up."""
    picture = np.random.default_rng(0).integers(0, 256, (11, width), np.uint8)
    frames = [grey_frame("gray", picture, FULL)] * 2
    path = with_tag(write(tmp_path / "a.avi", "rawvideo", frames), tag)
    np.testing.assert_array_equal(luma_of(path), [picture] * 2)


def test_raw_grey_of_16_bits_in_avi_is_refused(tmp_path: Path) -> None:
    frame = frame_of("gray16le", [np.zeros((16, 16), np.uint16)], FULL)
    path = with_tag(write(tmp_path / "a.avi", "rawvideo", [frame]), b"Y16 ")
    with pytest.raises(DecodeError, match=r"FFmpeg does not decode.*multi-page TIFF"):
        luma_of(path)


@pytest.mark.parametrize("suffix", ["avi", "mov"])
@pytest.mark.parametrize("limited", [False, True])
def test_motion_jpeg_is_full_range_unless_it_says_so(
    tmp_path: Path, suffix: str, limited: bool
) -> None:
    """JPEG has full range (JFIF); the comment CS=ITU601 is the one sign of limited range."""
    planes = [np.full((16, 16), 126, np.uint8), *[np.full((8, 8), 128, np.uint8)] * 2]
    planes[0][:8] = 32
    path = write(tmp_path / f"a.{suffix}", "mjpeg", [frame_of("yuvj420p", planes, FULL)])
    with av.open(str(path)) as container:
        comments = [
            bytes(packet).count(b"CS=ITU601") for packet in container.demux() if packet.size
        ]
    assert comments == [0]
    if limited:
        # FFmpeg's own comment is as long.
        content = path.read_bytes()
        at = content.index(b"\xff\xfe", content.index(b"\xff\xd8")) + 4
        comment = content[at : at + 10]
        assert comment.startswith(b"Lavc")
        path.write_bytes(content.replace(comment, b"CS=ITU601\0"))
    expected = np.rint((planes[0] - 16.0) * (255 / 219)) if limited else planes[0]
    assert np.abs(luma_of(path)[0] - expected).max() <= 2


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv422p", "yuv420p10le", "yuv444p12le"])
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
def test_luma_of_other_chroma_and_depth(tmp_path: Path, pix_fmt: str, colour_range: int) -> None:
    """Luma is stretched from the coded values, in one rounding; 10 bits of limited range hold all
    levels."""
    levels = PICTURES[:, :16, :16].astype(int)
    bits = av.VideoFormat(pix_fmt, 16, 16).components[0].bits
    black, white = (16, 235) if colour_range == LIMITED else (0, 255 + (1 - 2.0 ** (8 - bits)))
    unit = 1 << (bits - 8)
    codes = np.rint(unit * (black + levels * ((white - black) / 255))).astype(np.uint16)
    shown = np.rint((codes / unit - black) * (255 / (white - black)))
    chroma = np.full((8 if "420" in pix_fmt else 16, 16 if "444" in pix_fmt else 8), 128 * unit)
    frames = [frame_of(pix_fmt, [code, chroma, chroma], colour_range) for code in codes]
    luma = luma_of(write(tmp_path / "a.mkv", "ffv1", frames))
    np.testing.assert_array_equal(luma, shown)
    if bits > 8 or colour_range == FULL:
        np.testing.assert_array_equal(luma, levels)


@pytest.mark.parametrize("pix_fmt", ["bgr24", "bgra"])
def test_rows_that_lie_from_the_last_to_the_first(tmp_path: Path, pix_fmt: str) -> None:
    """AVI without compression, as Windows programs write it."""
    frames = [grey_frame(pix_fmt, picture[::-1], FULL) for picture in PICTURES]
    path = write(tmp_path / "a.avi", "rawvideo", frames, flipped_raw_rgb="1")
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).planes[0].line_size < 0
    np.testing.assert_array_equal(luma_of(path), PICTURES)


def test_packed_luma_of_ten_bits_is_stretched_in_one_rounding(tmp_path: Path) -> None:
    codes = np.arange(64, 64 + 28 * 32).reshape(28, 32)
    chroma = np.full((28, 32), 512)
    frame = frame_of("yuv444p10le", [codes, chroma, chroma], LIMITED)
    expected = np.rint((codes.astype(float) - 64) * 255 / 876).clip(0, 255)
    luma = luma_of(write(tmp_path / "a.mov", "v410", [frame]))
    np.testing.assert_array_equal(luma, expected[None])


def test_floating_point_is_refused(tmp_path: Path) -> None:
    frame = av.VideoFrame(32, 16, "grayf32le")
    frame.planes[0].update(np.ones(frame.planes[0].buffer_size // 4, "<f4").tobytes())
    path = write(tmp_path / "a.mov", "exr", [frame])
    with pytest.raises(DecodeError, match=r"floating-point values \(grayf32le\)"):
        list(Video(path))
