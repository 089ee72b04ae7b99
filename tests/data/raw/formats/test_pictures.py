"""A folder of pictures is one clip: in order, whole, with the values of its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.formats import pictures
from dist_train.data.raw.formats.pictures import _in_order
from dist_train.data.raw.stack import Choices, Stack
from dist_train.errors import DecodeError

WHOLE = PrepareSettings(roi="none")
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (3, 17, 23), np.uint8)
DEEP = RNG.integers(0, 1 << 16, (3, 17, 23), np.uint16)
COLOUR = RNG.integers(0, 256, (3, 17, 23, 3), np.uint8)
DEEP_COLOUR = RNG.integers(0, 1 << 16, (3, 17, 23, 3), np.uint16)


def by_opencv(path: Path, values: np.ndarray) -> None:
    """OpenCV has BGR."""
    assert cv2.imwrite(
        str(path), np.ascontiguousarray(values[..., ::-1]) if values.ndim == 3 else values
    )


def by_tifffile(path: Path, values: np.ndarray) -> None:
    tifffile.imwrite(path, values, photometric="rgb" if values.ndim == 3 else "minisblack")


def lossless_webp(path: Path, values: np.ndarray) -> None:
    path.write_bytes(imagecodecs.webp_encode(values, lossless=True))


def written(folder: Path, clip: np.ndarray, write: Callable[..., None], suffix: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, values in enumerate(clip):
        write(folder / f"frame{number}{suffix}", values)
    return folder


def stacked(folder: Path) -> tuple[Stack, np.ndarray]:
    stack = pictures.read(folder, folder, Choices())
    return stack, np.stack(list(stack.frames))


KEPT = {
    ".png": (by_opencv, (GREY, DEEP, COLOUR, DEEP_COLOUR)),
    ".tif": (by_tifffile, (GREY, DEEP, COLOUR, DEEP_COLOUR)),
    ".bmp": (by_opencv, (GREY, COLOUR)),
    ".pgm": (by_opencv, (GREY, DEEP)),
    ".ppm": (by_opencv, (COLOUR, DEEP_COLOUR)),
    ".webp": (lossless_webp, (COLOUR,)),
}


@pytest.mark.parametrize("suffix", KEPT)
def test_values_are_those_written(tmp_path: Path, suffix: str) -> None:
    write, clips = KEPT[suffix]
    for number, clip in enumerate(clips):
        folder = written(tmp_path / str(number), clip, write, suffix)
        assert pictures.reads_folder(folder)
        stack, values = stacked(folder)
        np.testing.assert_array_equal(values, clip)
        assert stack.dtype == values.dtype == clip.dtype
        assert stack.channels == (("grey",) if clip.ndim == 3 else ("red", "green", "blue"))
        assert (stack.count, stack.stopped_by) == (3, None)


def test_jpeg(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(20, 200, 64, dtype=np.uint8), (2, 48, 64))
    _, values = stacked(written(tmp_path / "a", smooth, by_opencv, ".jpg"))
    assert values.shape == smooth.shape
    assert np.abs(values.astype(int) - smooth).max() <= 4


KINDS = {
    "1 bit": (Image.fromarray(GREY[0] > 99), (GREY[0] > 99) * np.uint8(255)),
    "a palette of grey": (Image.fromarray(GREY[0]).convert("P"), GREY[0]),
    "a palette": (Image.fromarray(COLOUR[0]).quantize(7), None),
    "grey and alpha": (Image.merge("LA", [Image.fromarray(x) for x in GREY[:2]]), GREY[0]),
    "colour and alpha": (
        Image.merge("RGBA", [Image.fromarray(x) for x in (*np.moveaxis(COLOUR[0], 2, 0), GREY[0])]),
        COLOUR[0],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_png(tmp_path: Path, kind: str) -> None:
    image, expected = KINDS[kind]
    image.save(tmp_path / "a1.png")
    _, values = stacked(tmp_path)
    if expected is None:
        expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(values[0], expected)


@pytest.mark.parametrize("samples", [2, 4])
def test_alpha_of_16_bits_is_left_out(tmp_path: Path, samples: int) -> None:
    values = RNG.integers(0, 1 << 16, (9, 8, samples), np.uint16)
    (tmp_path / "a1.png").write_bytes(imagecodecs.png_encode(values))
    _, got = stacked(tmp_path)
    np.testing.assert_array_equal(got[0], values[..., 0] if samples == 2 else values[..., :3])


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(COLOUR[0]).save(tmp_path / "a1.png", exif=exif)
    np.testing.assert_array_equal(stacked(tmp_path)[1][0], np.rot90(COLOUR[0], -1))


@pytest.mark.parametrize(
    ("highest", "bits", "window"),
    [(4095, 12, None), (1000, None, (0, 1000)), (100, None, (0, 100))],
)
def test_pgm_tells_its_highest_value(
    tmp_path: Path, highest: int, bits: int | None, window: tuple[int, int] | None
) -> None:
    values = RNG.integers(0, highest + 1, (5, 7), np.uint16)
    stored = values.astype(">u2" if highest > 255 else np.uint8).tobytes()
    header = b"P5 # a camera\n7 5\n# more\n%d\n" % highest
    (tmp_path / "a1.pgm").write_bytes(header + stored)
    stack, got = stacked(tmp_path)
    np.testing.assert_array_equal(got[0], values)
    assert (stack.bits, stack.window) == (bits, window)


# The order.


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=30), st.booleans())
def test_order_of_numbers(numbers: set[int], padded: bool) -> None:
    expected = [f"t1_c{n:012d}.PNG" if padded else f"t1_c{n}.PNG" for n in sorted(numbers)]
    names, gap, count = _in_order(sorted(expected))
    assert names == expected
    steps = np.diff(sorted(numbers))
    assert (gap is None) == (len(set(steps.tolist())) < 2)
    assert count == len(names) if gap is None else count > len(names)


def test_frame2_is_before_frame10(tmp_path: Path) -> None:
    for number in range(12):
        by_opencv(tmp_path / f"frame{number}.png", np.full((4, 5), number, np.uint8))
    for beside in (".DS_Store", "Thumbs.db", "frame1.json", "notes.TXT", "._frame1.png"):
        (tmp_path / beside).write_bytes(b"x")
    assert stacked(tmp_path)[1][:, 0, 0].tolist() == list(range(12))


NO_ORDER = {
    "two numbers": (("t1_z1.png", "t1_z2.png", "t2_z1.png"), "differ in 2 numbers"),
    "no numbers": (("a.png", "b.png"), "a.png and b.png, in no order"),
    "two prefixes": (("a1.png", "b2.png"), "a1.png and b2.png, in no order"),
    "one number twice": (("a01.png", "a1.png"), "differ in no numbers"),
    "a number twice": (("a01.png", "a1.png", "a2.png"), "of one number"),
    "two kinds": (("a1.png", "a2.bmp"), "in no order"),
    "another file": (("a1.png", "a2.png", "a3.mp4"), "beside a3.mp4"),
    "a folder": (("a1.png", "more/a2.png"), "beside more"),
    "a folder like a picture": (("a1.png", "a2.png/b.txt"), "beside a2.png"),
}


@pytest.mark.parametrize("kind", NO_ORDER)
def test_names_without_an_order(tmp_path: Path, kind: str) -> None:
    names, message = NO_ORDER[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DecodeError, match=message) as raised:
        pictures.read(tmp_path, "here", Choices())
    assert raised.value.fix


def test_a_gap_in_the_numbers(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", np.repeat(GREY, 3, axis=0), by_opencv, ".png")
    (folder / "frame4.png").unlink()
    with pytest.raises(
        DecodeError,
        match=r"here: the clip stops after 8 of 9 declared frames: .*frame3.png and frame5.png",
    ):
        read_clip(folder, "a", "here", WHOLE)
    clip, record = read_clip(folder, "a", "here", replace(WHOLE, truncated="keep"))
    assert (len(clip), record["frames_declared"]) == (8, 9)


def test_every_tenth_frame_has_no_gap(tmp_path: Path) -> None:
    for number in (0, 10, 20):
        by_opencv(tmp_path / f"{number:03d}.png", GREY[0])
    assert stacked(tmp_path)[0].stopped_by is None


# Bad pictures.


OTHER = {
    "size": (GREY[0, :-1], r"frame2.png is 23 x 16 grey uint8; frame0.png is 23 x 17"),
    "colour": (COLOUR[0], r"frame2.png is 23 x 17 RGB uint8"),
    "depth": (DEEP[0], r"frame2.png is 23 x 17 grey uint16"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_picture_that_differs(tmp_path: Path, kind: str) -> None:
    values, message = OTHER[kind]
    folder = written(tmp_path / "a", GREY, by_opencv, ".png")
    by_opencv(folder / "frame2.png", values)
    with pytest.raises(DecodeError, match=f"^here: its picture {message}"):
        read_clip(folder, "a", "here", WHOLE)


@pytest.mark.parametrize("suffix", KEPT)
def test_cut_and_damaged_pictures(tmp_path: Path, suffix: str) -> None:
    """The picture is named; only what has no checksum can give other pixels."""
    write, clips = KEPT[suffix]
    folder = written(tmp_path / "a", clips[-1], write, suffix)
    path = folder / f"frame1{suffix}"
    whole = path.read_bytes()
    _, sound = stacked(folder)
    for length in (0, 1, 7, 20, 60, *range(0, len(whole), len(whole) // 12), len(whole) - 1):
        path.write_bytes(whole[:length])
        # A BMP may lack the last bytes, which only fill up its row.
        if suffix == ".bmp" and len(whole) - length < 4:
            np.testing.assert_array_equal(stacked(folder)[1], sound)
            continue
        with pytest.raises(DecodeError, match=f"^here: its picture {path.name} ") as raised:
            read_clip(folder, "a", "here", WHOLE)
        assert "\n" not in raised.value.reason
    for at in RNG.integers(8, len(whole), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(RNG.integers(8))
        path.write_bytes(damaged)
        try:
            _, values = stacked(folder)
        except DecodeError:
            continue
        # PNG has checksums.
        assert suffix != ".png" or (values == sound).all()


def test_cut_jpeg(tmp_path: Path) -> None:
    by_opencv(tmp_path / "a1.jpg", COLOUR[0])
    whole = (tmp_path / "a1.jpg").read_bytes()
    for length in range(0, len(whole), len(whole) // 30):
        (tmp_path / "a1.jpg").write_bytes(whole[:length])
        with pytest.raises(DecodeError, match=r"its picture a1.jpg "):
            stacked(tmp_path)


def huge_png() -> bytes:
    """A header of 30000 x 30000, with a right checksum, over the data of a small picture."""
    small = bytearray(imagecodecs.png_encode(GREY[0]))
    small[16:24] = (30_000).to_bytes(4) * 2
    small[29:33] = imagecodecs.zlib_crc32(bytes(small[12:29])).to_bytes(4)
    return bytes(small)


BAD = {
    "png": (huge_png(), "too small for its declared 30000 x 30000"),
    "pgm": (b"P5 999999 999999 255\nabc", "declares 999998000001 bytes of values, holds 3"),
    "ppm": (b"P3 1 1 255\n1 2 3", "cannot be read"),
    "jpg": (b"GIF89a", "cannot be read"),
    "bmp": (b"%PDF", "cannot be read"),
}


@pytest.mark.parametrize("suffix", BAD)
def test_bad_headers(tmp_path: Path, suffix: str) -> None:
    content, message = BAD[suffix]
    (tmp_path / f"a1.{suffix}").write_bytes(content)
    with pytest.raises(DecodeError, match=message):
        pictures.read(tmp_path, "here", Choices())


def test_values_above_the_declared_highest(tmp_path: Path) -> None:
    (tmp_path / "a1.pgm").write_bytes(b"P5 2 1 100\n\x05\x65")
    with pytest.raises(DecodeError, match="value 101"):
        pictures.read(tmp_path, "here", Choices())


def test_several_pictures_in_one_file(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a1.tif", GREY, photometric="minisblack")
    with pytest.raises(DecodeError, match=r"a1.tif holds 3 pictures"):
        pictures.read(tmp_path, "here", Choices())
    first, *more = (Image.fromarray(picture) for picture in COLOUR)
    (tmp_path / "a1.tif").unlink()
    first.save(tmp_path / "a1.webp", save_all=True, append_images=more)
    with pytest.raises(DecodeError, match=r"a1.webp holds 3 pictures"):
        pictures.read(tmp_path, "here", Choices())


def test_cmyk_is_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOUR[0]).convert("CMYK").save(tmp_path / "a1.jpg")
    with pytest.raises(DecodeError, match=r"a1.jpg has pixels of the kind CMYK.*grey or RGB"):
        pictures.read(tmp_path, "here", Choices())


def test_a_clip_of_pictures(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", COLOUR, by_opencv, ".png")
    clip, record = read_clip(folder, "a", "here", WHOLE)
    luma = np.rint(COLOUR @ np.array([0.299, 0.587, 0.114]))
    assert np.abs(clip - luma).max() <= 1
    assert record == {"frames_declared": 3, "box": None}
    shutil.rmtree(folder)
    folder = written(folder, COLOUR[:1], by_opencv, ".png")
    assert read_clip(folder, "a", "here", WHOLE)[0].shape == (1, 17, 23)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "pgm", "webp"])
def test_a_single_picture_is_no_clip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GREY[0]).save(path)
    with pytest.raises(DecodeError, match=r"single picture.*folder of a clip's pictures"):
        read_clip(path, path.name, "here", WHOLE)
