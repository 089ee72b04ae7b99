"""A TIFF file is read as it describes itself, or refused; never as something else."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from make_media import read_volume
from raw_files import stack_in
from tifffile import TiffWriter, imwrite

from dist_train.data.raw.formats.tiff import read
from dist_train.data.raw.stack import Choices
from dist_train.errors import DecodeError

STACK = np.random.default_rng(0).integers(0, 256, (6, 20, 24), dtype=np.uint8)
COLOUR = np.repeat(STACK[..., None], 3, axis=-1)
GREY = {"photometric": "minisblack"}
ORDER = np.random.default_rng(1).permutation(256)
PALETTE = np.zeros((3, 256), np.uint16)
PALETTE[:, ORDER] = np.arange(256) * 257


def by_pages(path: Path, pages: np.ndarray, **how: object) -> None:
    with TiffWriter(path) as tif:
        for page in pages:
            tif.write(page, **GREY, **how)


def appended(path: Path) -> None:
    for number, page in enumerate(STACK):
        imwrite(path, page, append=number > 0, **GREY)


def pyramid(path: Path) -> None:
    with TiffWriter(path) as tif:
        tif.write(STACK, subifds=1, tile=(16, 16), **GREY)
        tif.write(STACK[:, ::2, ::2], subfiletype=1, tile=(16, 16), **GREY)


# Ways to write the same stack.
PLAIN: dict[str, Callable[[Path], object]] = {
    "one write": lambda path: imwrite(path, STACK, **GREY),
    "no description": lambda path: imwrite(path, STACK, metadata=None, **GREY),
    "page by page": lambda path: by_pages(path, STACK),
    "page by page, contiguous": lambda path: by_pages(path, STACK, contiguous=True),
    "stacks of one page": lambda path: by_pages(path, STACK[:, None]),
    "pages of no description": lambda path: by_pages(path, STACK, metadata=None),
    "file by file": appended,
    "RGB page by page": lambda path: tiff_of_rgb_pages(path),
    "one directory for all": lambda path: imwrite(path, STACK, truncate=True, **GREY),
    "big": lambda path: imwrite(path, STACK, bigtiff=True, **GREY),
    "big-endian": lambda path: imwrite(path, STACK, byteorder=">", **GREY),
    "tiles": lambda path: imwrite(path, STACK, tile=(16, 16), **GREY),
    "deflated": lambda path: imwrite(path, STACK, compression="zlib", **GREY),
    "LZW": lambda path: imwrite(path, STACK, compression="lzw", **GREY),
    "Zstandard": lambda path: imwrite(path, STACK, compression="zstd", **GREY),
    "volume": lambda path: imwrite(path, STACK, volumetric=True, tile=(16, 16, 16), **GREY),
    "pyramid": pyramid,
    "ImageJ": lambda path: imwrite(path, STACK, imagej=True, metadata={"axes": "ZYX"}),
    "ImageJ, time": lambda path: imwrite(path, STACK, imagej=True, metadata={"axes": "TYX"}),
    "OME": lambda path: imwrite(path, STACK, ome=True, metadata={"axes": "ZYX"}),
    "OME, time": lambda path: imwrite(path, STACK, ome=True, metadata={"axes": "TYX"}),
    "RGB": lambda path: imwrite(path, COLOUR, photometric="rgb"),
    "RGB, planar": lambda path: imwrite(
        path, np.moveaxis(COLOUR, -1, 1), photometric="rgb", planarconfig="separate"
    ),
    "white is zero": lambda path: imwrite(path, 255 - STACK, photometric="miniswhite"),
    "white is zero, 16 bits": lambda path: imwrite(
        path, 65535 - STACK.astype(np.uint16) * 257, photometric="miniswhite"
    ),
    "palette": lambda path: imwrite(
        path, ORDER.astype(np.uint8)[STACK], photometric="palette", colormap=PALETTE
    ),
}


def tiff_of_rgb_pages(path: Path) -> None:
    with TiffWriter(path) as tif:
        for page in COLOUR:
            tif.write(page, photometric="rgb")


@pytest.mark.parametrize("way", PLAIN)
def test_the_same_stack_however_it_is_written(tmp_path: Path, way: str) -> None:
    PLAIN[way](tmp_path / "a.tif")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif", bits=16), STACK)


@pytest.mark.parametrize("way", PLAIN)
def test_cut_anywhere_is_whole_or_refused(tmp_path: Path, way: str) -> None:
    """Metadata and bytes that fill up may come last; all else is missed."""
    path = tmp_path / "a.tif"
    PLAIN[way](path)
    content = path.read_bytes()
    refused = 0
    for part in range(1, 20):
        path.write_bytes(content[: len(content) * part // 20])
        try:
            clip = read_volume(path, bits=16)
        except DecodeError:
            refused += 1
        else:
            np.testing.assert_array_equal(clip, STACK)
    assert refused >= 12


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_two_levels(tmp_path: Path, white_is_zero: bool) -> None:
    how = "miniswhite" if white_is_zero else "minisblack"
    imwrite(tmp_path / "a.tif", (STACK > 100) ^ white_is_zero, photometric=how)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif"), (STACK > 100) * np.uint8(255))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("laid", UPRIGHT)
def test_orientation(tmp_path: Path, laid: int) -> None:
    """TIFF 6.0: of 6, say, the first row is the right side, and the first column the top."""
    imwrite(tmp_path / "a.tif", STACK, extratags=[(274, "H", 1, laid, True)], **GREY)
    expected = np.stack([UPRIGHT[laid](picture) for picture in STACK])
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("photometric", [0, 1])
def test_fewer_bits_than_eight_span_the_whole_range(
    tmp_path: Path, bits: int, photometric: int
) -> None:
    levels = np.arange(64).reshape(8, 8) % (1 << bits)
    packed = "".join(f"{level:0{bits}b}" for level in levels.reshape(-1))
    data = int(packed, 2).to_bytes(8 * bits, "big")
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)
    grey = np.rint(levels * 255 / ((1 << bits) - 1))
    expected = grey if photometric else 255 - grey
    np.testing.assert_array_equal(read_volume(path), expected[None])


@pytest.mark.parametrize("width", [3, 4])
def test_narrow_pictures_are_no_colours(tmp_path: Path, width: int) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (20, 64, width), dtype=np.uint8)
    imwrite(tmp_path / "a.tif", stack, **GREY)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif"), stack)


def several(path: Path, *stacks: np.ndarray, **how: object) -> None:
    with TiffWriter(path) as tif:
        for stack in stacks:
            tif.write(stack, **GREY, **how)


def micro_manager(path: Path, frames: int, **more: object) -> None:
    """Write 6 of a set's ``frames`` as Micro-Manager does: a directory of 13 tags
    before each picture, and an index of all at the end."""
    depth, height, width = STACK.shape
    summary = {"Channels": 1, "Slices": 1, "Frames": frames, "Positions": 1}
    said = json.dumps(summary | {"MicroManagerVersion": "2.0"} | more).encode()
    size = 2 + 13 * 12 + 4 + height * width + 16
    starts = [40 + len(said) + size * number for number in range(depth)]
    pages = b""
    for number, start in enumerate(starts):
        pixels, more = start + 162, start + 162 + height * width
        tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: pixels, 277: 1, 278: height}
        tags |= {279: height * width, 296: 1, 305: 0, 315: 0, 51123: more}
        pages += struct.pack("<H", 13)
        for tag, value in tags.items():
            kind, count = (2, 16) if tag == 51123 else (4, 1)
            pages += struct.pack("<HHII", tag, kind, count, value)
        pages += struct.pack("<I", starts[number + 1] if number + 1 < depth else 0)
        pages += STACK[number].tobytes() + b'{"FrameIndex":0}'
    index = struct.pack("<II", 3453623, depth)
    index += b"".join(struct.pack("<5I", 0, 0, i, 0, at) for i, at in enumerate(starts))
    index_at = 40 + len(said) + len(pages)
    places = (54773648, index_at, 483765892, 0, 99384722, 0, 2355492, len(said))
    head = struct.pack("<2sHI8I", b"II", 42, starts[0], *places)
    path.write_bytes(head + said + pages + index)


def test_micro_manager(tmp_path: Path) -> None:
    micro_manager(tmp_path / "run_MMStack.tif", 6)
    np.testing.assert_array_equal(read_volume(tmp_path / "run_MMStack.tif"), STACK)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "two stacks": (
        lambda path: several(path, STACK, STACK[:3, :10]),
        r"2 series of pictures \(0 QYX \[6, 20, 24\], 1 QYX \[3, 10, 24\]\)\. Choose one by --se",
    ),
    "pages of two sizes": (lambda path: several(path, STACK[0], STACK[0, :9]), "2 series"),
    "channels": (
        lambda path: imwrite(path, STACK[:3], metadata={"axes": "CYX"}, **GREY),
        r"has 3 channels \(0 channel 0, 1 channel 1, 2 channel 2\)\. Choose them: --channels",
    ),
    "time and depth": (
        lambda path: imwrite(path, STACK.reshape(2, 3, 20, 24), metadata={"axes": "TZYX"}, **GREY),
        r"has both time and depth \(T of 2, Z of 3\)",
    ),
    "positions": (
        lambda path: imwrite(path, STACK.reshape(2, 3, 20, 24), metadata={"axes": "RZYX"}, **GREY),
        "R is neither time nor depth",
    ),
    "depth last": (lambda path: imwrite(path, STACK, metadata={"axes": "YXZ"}, **GREY), "axes YXZ"),
    "no axes": (lambda path: imwrite(path, STACK.reshape(2, 3, 20, 24), **GREY), "axes QQYX"),
    "four samples": (
        lambda path: imwrite(path, STACK[..., None].repeat(4, -1), photometric="separated"),
        r"4 samples a pixel \(QYXS, SEPARATED\)",
    ),
    "Micro-Manager set": (lambda path: micro_manager(path, 12), "MMStack series is missing files"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    make(path := tmp_path / "a.tif")
    with pytest.raises(DecodeError, match=message) as raised:
        read_volume(path)
    assert "\n" not in str(raised.value)


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
    with pytest.raises(DecodeError, match=r"is one file of an OME set with b\.tif"):
        read_volume(path)


def test_ome_tiff_is_read_alike_under_another_name(tmp_path: Path) -> None:
    """Its metadata name the file: taken for another one, two channels would pass for depth."""
    path = ome_tiff(tmp_path / "a.ome.tif", np.zeros((3, 2, 8, 9), np.uint8), "ZCYX")
    copy = tmp_path / "nameless"
    copy.write_bytes(path.read_bytes())
    for place, where in ((path, None), (copy, "s3://bucket/a.ome.tif")):
        with pytest.raises(DecodeError, match="has 2 channels"):
            read_volume(place, where, ".tif")
        assert read_volume(place, where, ".tif", channels="1").shape == (3, 8, 9)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_fewer_pages_than_declared(tmp_path: Path, compression: str | None) -> None:
    """The chain of pages may end well: a rewritten file, whose description is an old one."""
    for how in ({"metadata": {"axes": "ZYX"}, "imagej": True}, {"photometric": "minisblack"}):
        path = tmp_path / "a.tif"
        imwrite(path, STACK[:2], compression=compression if "imagej" not in how else None, **how)
        content = path.read_bytes()
        for before, after in ((b"images=2", b"images=6"), (b"slices=2", b"slices=6")):
            content = content.replace(before, after)
        path.write_bytes(content.replace(b'"shape": [2,', b'"shape": [6,'))
        with pytest.raises(DecodeError, match="is cut short: 6 frames are declared"):
            read_volume(path)


@pytest.mark.parametrize(("tag", "is_needed"), [(262, True), (270, True), (282, False)])
def test_a_tag_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tag: int, is_needed: bool
) -> None:
    """tifffile goes on without it: as if, say, white were 0."""
    path = tmp_path / "a.tif"
    imwrite(path, STACK, **GREY)
    with tifffile.TiffFile(path) as tif:
        at = tif.pages[0].tags[tag].offset
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, at + 2, 200)
    path.write_bytes(content)
    if is_needed:
        with pytest.raises(DecodeError, match=r"as it is meant.*invalid data type 200"):
            read_volume(path)
    else:
        np.testing.assert_array_equal(read_volume(path), STACK)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("page", [0, 2])
@pytest.mark.parametrize("to", [4, 1 << 30])
def test_a_chain_of_pages_that_leads_nowhere(tmp_path: Path, page: int, to: int) -> None:
    """tifffile follows some of these for ever."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for picture in np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7):
            writer.write(picture, photometric="minisblack", contiguous=False)
    with tifffile.TiffFile(path) as tif:
        found = tif.pages[page]
        at = found.offset + tif.tiff.tagnosize + len(found.tags) * tif.tiff.tagsize
    content = bytearray(path.read_bytes())
    content[at : at + 4] = to.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=f"is cut short: page {page + 1} is not there"):
        read(path, path, Choices())


SIZES = {"T": 3, "Z": 4, "C": 2, "Y": 6, "X": 7}
HYPERSTACK = np.random.default_rng(3).integers(0, 1 << 16, (*SIZES.values(),), dtype=np.uint16)


@pytest.mark.parametrize("order", ["TZC", "TCZ", "CZT", "ZTC"])
@pytest.mark.parametrize("depth", ["T", "Z"])
def test_axes_of_ome(tmp_path: Path, order: str, depth: Literal["T", "Z"]) -> None:
    metadata = {
        "axes": f"{order}YX",
        "Channel": {"Name": ["DAPI", "GFP"]},
        **{"PhysicalSizeX": 0.5, "PhysicalSizeY": 500, "PhysicalSizeYUnit": "nm"},
        **{"PhysicalSizeZ": 2, "TimeIncrement": 20, "TimeIncrementUnit": "ms"},
    }
    values = np.moveaxis(HYPERSTACK, (0, 1, 2), [order.index(axis) for axis in "TZC"])
    imwrite(tmp_path / "a.tif", values, ome=True, metadata=metadata, **GREY)
    stack, frames = stack_in(tmp_path / "a.tif", depth_axis=depth, plane=1)
    expected = HYPERSTACK[:, 1] if depth == "T" else HYPERSTACK[1]
    np.testing.assert_array_equal(frames, np.moveaxis(expected, 1, -1))
    assert stack.channels == ("DAPI", "GFP")
    assert stack.spacing == (None if depth == "T" else 2.0, 0.5, 0.5)
    assert stack.interval == (0.02 if depth == "T" else None)
    with pytest.raises(DecodeError, match="both time and depth"):
        read(tmp_path / "a.tif", "a", Choices())
    with pytest.raises(DecodeError, match=r"Choose one of them by --plane, from 0 to"):
        read(tmp_path / "a.tif", "a", Choices(depth_axis=depth, plane=4))


@pytest.mark.parametrize(
    ("times", "interval"), [([0, 0.1, 0.2], 0.1), ([0, 0.1, 0.21], None), ([0.1, 0.1, 0.1], None)]
)
def test_time_stamps_of_ome(tmp_path: Path, times: list[float], interval: float | None) -> None:
    metadata = {"axes": "TYX", "TimeIncrement": 3, "Plane": {"DeltaT": times}}
    imwrite(tmp_path / "a.tif", STACK[:3], ome=True, metadata=metadata, **GREY)
    assert stack_in(tmp_path / "a.tif")[0].interval == interval


def test_series_of_ome(tmp_path: Path) -> None:
    """Levels of a pyramid are none."""
    with TiffWriter(tmp_path / "a.tif", ome=True) as tif:
        for number, name in enumerate(("first", "second")):
            stack, how = STACK + np.uint8(number), {"tile": (16, 16), **GREY}
            metadata = {"axes": "ZYX", "Name": name, "PhysicalSizeZ": number + 1}
            tif.write(stack, subifds=1, metadata=metadata, **how)
            tif.write(stack[:, ::2, ::2], subfiletype=1, **how)
    with pytest.raises(DecodeError, match=r"holds 2 series of pictures \(0 first ZYX \["):
        read(tmp_path / "a.tif", "a", Choices())
    stack, frames = stack_in(tmp_path / "a.tif", series=1)
    np.testing.assert_array_equal(frames, STACK + np.uint8(1))
    assert stack.spacing[0] == 2


@pytest.mark.parametrize("how", ["ome", "imagej"])
def test_stacks_of_colour(tmp_path: Path, how: str) -> None:
    colours = np.random.default_rng(2).integers(0, 256, (4, 6, 7, 3), dtype=np.uint8)
    metadata = {"axes": "TYXS"}
    imwrite(tmp_path / "a.tif", colours, photometric="rgb", metadata=metadata, **{how: True})
    stack, frames = stack_in(tmp_path / "a.tif")
    np.testing.assert_array_equal(frames, colours)
    assert stack.channels == ("red", "green", "blue")


def test_planes_that_ome_declares_and_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    imwrite(path, STACK, ome=True, metadata={"axes": "TYX"}, **GREY)
    said = tifffile.tiffcomment(path)
    for before, after in (('SizeT="6"', 'SizeT="7"'), ('PlaneCount="6"', 'PlaneCount="7"')):
        tifffile.tiffcomment(path, said := said.replace(before, after))
        with pytest.raises(DecodeError, match=r"is cut short|as it is meant"):
            stack_in(path)


def test_hyperstacks_of_imagej(tmp_path: Path) -> None:
    metadata = {"axes": "TZCYX", "unit": "micron", "spacing": 1.5, "finterval": 0.25}
    imwrite(tmp_path / "a.tif", HYPERSTACK, imagej=True, resolution=(4, 2), metadata=metadata)
    stack, frames = stack_in(tmp_path / "a.tif", depth_axis="Z", plane=2)
    np.testing.assert_array_equal(frames, np.moveaxis(HYPERSTACK[2], 1, -1))
    assert (stack.channels, stack.spacing) == (("channel 0", "channel 1"), (1.5, 0.5, 0.25))
    stack, frames = stack_in(tmp_path / "a.tif", depth_axis="T", plane=3)
    np.testing.assert_array_equal(frames, np.moveaxis(HYPERSTACK[:, 3], 1, -1))
    assert (stack.spacing, stack.interval) == ((None, 0.5, 0.25), 0.25)
    np.testing.assert_array_equal(
        read_volume(tmp_path / "a.tif", bits=16, channels="1", depth_axis="Z", plane=2),
        HYPERSTACK[2, :, 1] >> 8,
    )


def test_imagej_in_pixels_has_no_spacing(tmp_path: Path) -> None:
    imwrite(tmp_path / "a.tif", STACK, imagej=True, resolution=(72, 72), metadata={"axes": "ZYX"})
    assert stack_in(tmp_path / "a.tif")[0].spacing == (None, None, None)


def test_signed_values_of_imagej(tmp_path: Path) -> None:
    values = np.array([[[-32768, -1000], [0, 32767]]], np.int16)
    stored = (values.astype(np.int32) + 32768).astype(np.uint16)
    metadata = {"axes": "ZYX", "cf": 0, "c0": -32768, "c1": 1}
    imwrite(tmp_path / "a.tif", stored, imagej=True, metadata=metadata)
    np.testing.assert_array_equal(stack_in(tmp_path / "a.tif")[1], values)


@pytest.mark.parametrize("dtype", ["i1", "i2", "u4", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("how", [{}, {"tile": (16, 16), "bigtiff": True, "byteorder": ">"}])
def test_values_are_kept(tmp_path: Path, dtype: str, how: dict[str, Any]) -> None:
    values = (STACK.astype(np.float64) - 128).astype(dtype)
    imwrite(tmp_path / "a.tif", values, **GREY, **how)
    np.testing.assert_array_equal(stack_in(tmp_path / "a.tif")[1], values)
    if dtype != "u4":
        imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
        with pytest.raises(DecodeError, match="white is zero, in"):
            stack_in(tmp_path / "a.tif")


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_samples_that_are_channels(tmp_path: Path, planar: str) -> None:
    values = STACK.reshape(3, 20, 24, 2)
    laid = values if planar == "contig" else np.moveaxis(values, -1, 1)
    imwrite(tmp_path / "a.tif", laid, planarconfig=planar, **GREY)
    stack, frames = stack_in(tmp_path / "a.tif")
    np.testing.assert_array_equal(frames, values)
    assert stack.channels == ("channel 0", "channel 1")


def test_metadata_of_micro_manager(tmp_path: Path) -> None:
    more = {"PixelSize_um": 0.65, "z-step_um": 2, "Interval_ms": 50, "BitDepth": 12}
    micro_manager(tmp_path / "a_MMStack.tif", 6, **more)
    stack = stack_in(tmp_path / "a_MMStack.tif")[0]
    assert (stack.spacing, stack.interval, stack.bits) == ((None, 0.65, 0.65), 0.05, 12)


def test_a_file_that_nobody_reads_is_closed(tmp_path: Path) -> None:
    imwrite(tmp_path / "a.tif", STACK, **GREY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    stack = read(tmp_path / "a.tif", "a", Choices())
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del stack
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_bits_are_those_of_the_chosen_image(tmp_path: Path) -> None:
    with TiffWriter(tmp_path / "a.tif", ome=True) as tif:
        for bits in (10, 14):
            metadata = {"axes": "ZYX", "SignificantBits": bits}
            tif.write(STACK.astype(np.uint16), metadata=metadata, **GREY)
    assert stack_in(tmp_path / "a.tif", series=0)[0].bits == 10
    assert stack_in(tmp_path / "a.tif", series=1)[0].bits == 14
