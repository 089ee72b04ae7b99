"""Grey that was written without loss comes back without loss, at all 256 levels."""

from __future__ import annotations

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


def coded(pix_fmt: str, pictures: np.ndarray) -> list[av.VideoFrame]:
    """Frames of these grey levels, uint8 [D, H, W], without a conversion by FFmpeg."""
    frames = []
    for picture in pictures:
        height, width = picture.shape
        frame = av.VideoFrame(width, height, pix_fmt)
        components = frame.format.components
        bits = components[0].bits
        values = picture.astype(np.uint16)
        # Filled up by their own highest bits, as the whole range needs it.
        values = values if bits == 8 else (values << (bits - 8)) | (values >> (16 - bits))
        dtype = "<u2" if bits > 8 else np.uint8
        for number, plane in enumerate(frame.planes):
            repeats = sum(component.plane == number for component in components)
            repeats = 4 if pix_fmt == "bgr0" else repeats
            row = np.repeat(values, repeats, axis=1).astype(dtype)
            rows = np.zeros((height, plane.line_size), np.uint8)
            rows[:, : row.shape[1] * row.itemsize] = row.view(np.uint8)
            plane.update(rows.tobytes())
        frames.append(frame)
    return frames


def write(
    path: Path, codec: str, pix_fmt: str, pictures: np.ndarray, colour_range: int, **how: str
) -> None:
    with av.open(str(path), "w", options=how) as output:
        stream = output.add_stream(codec, rate=20, options=OPTIONS.get(codec, {}))
        stream.height, stream.width = pictures.shape[1:]
        stream.pix_fmt = pix_fmt
        stream.codec_context.color_range = colour_range
        for frame in coded(pix_fmt, pictures):
            frame.color_range = colour_range
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


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
            path = tmp_path / f"{pix_fmt}{colour_range}.{suffix}"
            write(path, name, pix_fmt, pictures, colour_range)
            luma = np.stack([frame.luma for frame in Video(path)])
            np.testing.assert_array_equal(luma, pictures, err_msg=f"{pix_fmt} {colour_range}")


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv422p", "yuv420p10le", "yuv444p12le"])
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
def test_luma_of_other_chroma_and_depth(tmp_path: Path, pix_fmt: str, colour_range: int) -> None:
    """Luma is stretched from what is coded, in one rounding; 10 bits of limited range hold all."""
    path = tmp_path / "a.mkv"
    levels = PICTURES[:, :16, :16].astype(int)
    bits = av.VideoFormat(pix_fmt, 16, 16).components[0].bits
    black, white = (16, 235) if colour_range == LIMITED else (0, 255 + (1 - 2.0 ** (8 - bits)))
    unit = 1 << (bits - 8)
    codes = np.rint(unit * (black + levels * ((white - black) / 255))).astype(np.uint16)
    shown = np.rint((codes / unit - black) * (255 / (white - black)))
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = 16, 16, pix_fmt
        stream.codec_context.color_range = colour_range
        for picture in codes:
            frame = av.VideoFrame(16, 16, pix_fmt)
            frame.color_range = colour_range
            for number, plane in enumerate(frame.planes):
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                values = np.full((plane.height, plane.width), 128 * unit) if number else picture
                row = values.astype(np.uint8 if bits == 8 else "<u2").view(np.uint8)
                rows[:, : row.shape[1]] = row
                plane.update(rows.tobytes())
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    luma = np.stack([frame.luma for frame in Video(path)])
    np.testing.assert_array_equal(luma, shown)
    if bits > 8 or colour_range == FULL:
        np.testing.assert_array_equal(luma, levels)


@pytest.mark.parametrize("pix_fmt", ["bgr24", "bgra"])
def test_rows_that_lie_from_the_last_to_the_first(tmp_path: Path, pix_fmt: str) -> None:
    """AVI without compression, as Windows programs write it."""
    path = tmp_path / "a.avi"
    write(path, "rawvideo", pix_fmt, PICTURES[:, ::-1], FULL, flipped_raw_rgb="1")
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).planes[0].line_size < 0
    np.testing.assert_array_equal(np.stack([frame.luma for frame in Video(path)]), PICTURES)


def test_packed_luma_of_ten_bits_is_stretched_in_one_rounding(tmp_path: Path) -> None:
    codes = np.arange(64, 64 + 28 * 32, dtype="<u2").reshape(28, 32)
    frame = av.VideoFrame(32, 28, "yuv444p10le")
    for number, plane in enumerate(frame.planes):
        rows = np.full((28, plane.line_size // 2), 512, "<u2")
        rows[:, :32] = rows[:, :32] if number else codes
        plane.update(rows.tobytes())
    with av.open(str(tmp_path / "a.mov"), "w") as output:
        stream = output.add_stream("v410", rate=20)
        stream.height, stream.width, stream.pix_fmt = 28, 32, "yuv444p10le"
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    (read,) = Video(tmp_path / "a.mov")
    expected = np.rint((codes.astype(float) - 64) * 255 / 876).clip(0, 255)
    np.testing.assert_array_equal(read.luma, expected)


def test_floating_point_is_refused(tmp_path: Path) -> None:
    frame = av.VideoFrame(32, 16, "grayf32le")
    frame.planes[0].update(np.ones(frame.planes[0].buffer_size // 4, "<f4").tobytes())
    with av.open(str(tmp_path / "a.mov"), "w") as output:
        stream = output.add_stream("exr", rate=20)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "grayf32le"
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(DecodeError, match=r"floating-point values \(grayf32le\)"):
        list(Video(tmp_path / "a.mov"))
