"""The outline's box: within two pixels of the truth, whatever the compression and clutter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, environment
from make_media import ORANGE, drifting, outlined_frames, union_of, write_video
from scipy import ndimage

from dist_train.data.raw.frame import Frame
from dist_train.data.raw.outline import (
    GAP,
    GAPS,
    HOLE,
    MARGIN,
    SMALLER,
    Box,
    OutlineColour,
    crop_to_outline,
    find_outline,
    find_thing,
)
from dist_train.data.raw.video import Video
from dist_train.data.synthetic.drawing import draw_clip, render_clip
from dist_train.errors import DecodeError, RoiError

COLOUR = OutlineColour()
START = Box(20, 30, 70, 84)


def furthest_side(found: Box, truth: Box) -> int:
    return max(
        abs(found.top - truth.top),
        abs(found.left - truth.left),
        abs(found.bottom - truth.bottom),
        abs(found.right - truth.right),
    )


@pytest.mark.parametrize("crf", [18, 28, 35])
@pytest.mark.parametrize("start", [START, Box(11, 17, 36, 101), Box(3, 41, 90, 66)])
def test_union_is_within_two_pixels(tmp_path: Path, crf: int, start: Box) -> None:
    boxes = drifting(start, 6, step=(0, 1))
    path = write_video(tmp_path / "a.mp4", outlined_frames(boxes), options={"crf": str(crf)})
    clip, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, union_of(boxes)) <= 2
    assert clip.shape == (6, found.bottom - found.top, found.right - found.left)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("full_range", [False, True])
def test_pixel_formats_and_ranges(tmp_path: Path, pix_fmt: str, full_range: bool) -> None:
    boxes = drifting(START, 4)
    path = write_video(
        tmp_path / "a.mp4", outlined_frames(boxes), pix_fmt=pix_fmt, full_range=full_range
    )
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, union_of(boxes)) <= 2


@pytest.mark.parametrize("bt709", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
def test_colour_is_exact(tmp_path: Path, full_range: bool, bt709: bool) -> None:
    """An even patch of (224, 107, 34) is found by ranges of a few levels around it, and only so."""
    frames = np.full((1, 64, 64, 3), 40, np.uint8)
    frames[:, 16:48, 24:40] = (224, 107, 34)
    path = write_video(
        tmp_path / "a.mp4", frames, options={"qp": "0"}, full_range=full_range, bt709=bt709
    )
    (frame,) = Video(path)
    assert frame.bt709 == bt709
    near = OutlineColour(red=(221, 227), green=(104, 110), blue=(31, 37))
    found = find_thing(frame, near)
    assert found is not None
    assert not found.is_open
    # Chroma of half the resolution blends with the ground at the rim.
    assert furthest_side(found.box, Box(16, 24, 48, 40)) <= 2
    for other in ({"red": (230, 240)}, {"green": (90, 101)}, {"blue": (40, 50)}):
        assert find_thing(frame, replace(near, **other)) is None


def test_odd_frame_with_the_outline_at_its_last_pixel(tmp_path: Path) -> None:
    box = Box(31, 47, 81, 101)
    path = write_video(
        tmp_path / "a.mkv", outlined_frames([box] * 2, height=81, width=101), codec="ffv1"
    )
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, box) <= 2
    assert (found.bottom, found.right) == (81, 101)


@pytest.mark.parametrize("colour", [(255, 20, 20), (224, 107, 34), (250, 250, 250), (20, 60, 250)])
def test_blobs_elsewhere_do_not_disturb(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = outlined_frames([START] * 4)
    frames[:, 4:14, 100:120] = colour
    frames[2:, 80:92, 5:25] = colour
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "23"})
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, START) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("clips", [30, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize("crf", [18, 28, 38])
def test_synthetic_clips_with_blobs_near_and_far(tmp_path: Path, crf: int, clips: int) -> None:
    """Of 100 clips at each quality, 99 have all four sides within two pixels of what was drawn."""
    off = []
    for index in range(clips):
        clip = render_clip(replace(draw_clip(11, index), depth=4), stalled=False)
        scatter_blobs(clip.frames, np.random.default_rng(index))
        path = write_video(tmp_path / "a.mp4", clip.frames, options={"crf": str(crf)})
        _, found = crop_to_outline(Video(path), COLOUR)
        off.append(furthest_side(found, union_of(clip.boxes)))
    assert np.mean(np.array(off) <= 2) >= 0.99, f"{sorted(off)[-5:]} are the worst"


def scatter_blobs(frames: np.ndarray, rng: np.random.Generator) -> None:
    """Draw bright blobs of the outline's red or one like it: 4 beside it, 1 inside, 6 far away.

    Discs with a soft edge and a radius of 2 to 10 pixels, the same in all frames, each at least 3
    pixels from the line. Every third has a core that is too bright for the outline's colour.
    """
    line = (frames[..., 0].astype(np.int16) - frames[..., 2] > 40).any(axis=0)
    inside = ndimage.binary_fill_holes(line) & ~line
    distance = ndimage.distance_transform_edt(~line)
    for number in range(11):
        radius, gap = rng.uniform(2, 10), rng.uniform(3, 12)
        if number < 4:
            places = ~inside & (abs(distance - radius - gap) < 1)
        elif number < 5:
            radius = max(min(radius, distance[inside].max() - 4), 1)
            places = inside & (distance >= radius + 3)
        else:
            places = ~inside & (distance > radius + 20)
        if not places.any():
            continue
        middle = rng.choice(np.argwhere(places))
        colour = REDS[rng.integers(len(REDS))] + rng.integers(-12, 13, 3)
        paint(frames, middle, radius, colour.clip(0, 255))
        if number % 3 == 0:
            paint(frames, middle, radius / 2, (255, 235, 200))


REDS = np.array([(224, 107, 34), (255, 70, 40), (235, 120, 60), (200, 70, 50)])


def paint(
    frames: np.ndarray, middle: Sequence[int], radius: float, colour: Sequence[int] = ORANGE
) -> None:
    """Draw a disc with a soft edge around (row, column) in all frames."""
    rows, columns = (slice(max(int(m - radius - 1), 0), int(m + radius + 2)) for m in middle)
    part = frames[:, rows, columns]
    y, x = np.indices(part.shape[1:3])
    away = np.hypot(rows.start + y - middle[0], columns.start + x - middle[1])
    cover = np.clip(radius + 0.5 - away, 0, 1)[..., None]
    part[:] = np.rint(part * (1 - cover) + np.array(colour) * cover)


@pytest.mark.parametrize("core", [None, (255, 245, 220)], ids=["solid", "too bright a core"])
def test_a_blob_larger_than_the_outline(tmp_path: Path, core: tuple[int, int, int] | None) -> None:
    frames = outlined_frames([Box(50, 70, 74, 94)] * 3)
    paint(frames, (30, 30), 16)
    if core:
        # A hole, but smaller than that in the outline.
        paint(frames, (30, 30), 4, core)
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "18"})
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, Box(50, 70, 74, 94)) <= 2


def test_a_broken_outline_beside_a_blob_with_a_bright_core(tmp_path: Path) -> None:
    frames = outlined_frames([START] * 3)
    # A gap that no closing mends: nothing encloses the vessel, but the blob has a hole.
    frames[:, 40:48, 76:] = 30
    paint(frames, (12, 112), 9)
    paint(frames, (12, 112), 5, (255, 245, 220))
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "18"})
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, START) <= 2


@pytest.mark.parametrize("crf", [18, 38])
def test_a_blob_on_the_outline_widens_the_box_by_itself(tmp_path: Path, crf: int) -> None:
    """It cannot be told from the line, so the box is too large there, and never too small."""
    frames = outlined_frames([START] * 3)
    paint(frames, (45, 86), 6)
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": str(crf)})
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, replace(START, right=93)) <= 2


def test_an_outline_in_three_pieces(tmp_path: Path) -> None:
    frames = outlined_frames([START] * 3)
    for gap in (slice(28, 44), slice(76, 92)):
        frames[:, 42:48, gap] = 30
    frames[:, 62:80, 54:60] = 30
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, START) <= 2


@pytest.fixture
def thick() -> np.ndarray:
    """Frames with a line of five pixels around a rectangle, which fills ``START``."""
    frames = outlined_frames([None] * 3)
    frames[:, 20:70, 30:84] = ORANGE
    frames[:, 25:65, 35:79] = 45
    return frames


def test_a_blob_that_hangs_on_the_outline_by_a_neck(thick: np.ndarray, tmp_path: Path) -> None:
    paint(thick, (45, 93), 6)
    thick[:, 44:46, 82:90] = ORANGE
    path = write_video(tmp_path / "a.mkv", thick, codec="ffv1")
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, START) <= 2


def test_a_line_as_thin_as_a_neck(thick: np.ndarray, tmp_path: Path) -> None:
    """What is left of the outline without it is a ring of its own."""
    thick[:, 20:70, 60:65] = ORANGE
    thick[:, 22:68, 40:50] = 45
    path = write_video(tmp_path / "a.mkv", thick, codec="ffv1")
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, START) <= 2


@pytest.mark.parametrize("direction", [(0, 4), (4, 0), (-3, -5)])
def test_second_pass_equals_a_brute_force_crop(tmp_path: Path, direction: tuple[int, int]) -> None:
    start = Box(80, 90, 120, 140)
    boxes = drifting(start, 12, step=direction)
    path = write_video(tmp_path / "a.mp4", outlined_frames(boxes, height=200, width=240))
    found = [find_outline(frame, COLOUR) for frame in Video(path)]
    union = union_of(found)
    assert not found[0].grown(MARGIN, 200, 240).contains(union), "the window would have sufficed"
    expected = np.stack([union.cut(frame.luma) for frame in Video(path)])
    clip, box = crop_to_outline(Video(path), COLOUR)
    assert box == union
    np.testing.assert_array_equal(clip, expected)


def test_window_equals_a_brute_force_crop(tmp_path: Path) -> None:
    """The outline is first seen in the third frame: those before it are cut too."""
    boxes = [None, None, *drifting(START, 5, step=(1, 2)), None]
    path = write_video(tmp_path / "a.mp4", outlined_frames(boxes))
    union = union_of([find_outline(frame, COLOUR) for frame in Video(path)])
    clip, box = crop_to_outline(Video(path), COLOUR)
    assert box == union
    np.testing.assert_array_equal(clip, np.stack([union.cut(f.luma) for f in Video(path)]))


def patchy_frame(
    rng: np.random.Generator, height: int, width: int, *, full_range: bool, bt709: bool
) -> Frame:
    """Patches of any luma and chroma, with a little noise: many of them near the outline's."""

    def plane(height: int, width: int, patch: int) -> np.ndarray:
        coarse = rng.integers(0, 256, (height // patch + 1, width // patch + 1), dtype=np.uint8)
        levels = np.kron(coarse, np.ones((patch, patch), np.uint8))[:height, :width]
        return np.clip(levels + rng.integers(-9, 10, levels.shape), 0, 255).astype(np.uint8)

    chroma = -(-height // 2), -(-width // 2)
    return Frame(plane(height, width, 7), plane(*chroma, 5), plane(*chroma, 6), full_range, bt709)


def outline_by_definition(frame: Frame, colour: OutlineColour) -> Box | None:
    """What ``find_outline`` promises, in RGB and over the whole frame."""
    height, width = frame.luma.shape
    scale = 1.0 if frame.full_range else 255 / 224
    cb, cr = ((plane.astype(np.float32) - 128) * scale for plane in (frame.cb, frame.cr))
    red, blue = (1.5748, 1.8556) if frame.bt709 else (1.402, 1.772)
    green = (-0.1873, -0.4681) if frame.bt709 else (-0.3441, -0.7141)
    shifts = red * cr, green[0] * cb + green[1] * cr, blue * cb
    ranges = colour.red, colour.green, colour.blue
    mask = whole(shifts[0] - shifts[2] >= colour.red_over_blue, height, width)
    for shift, (low, high) in zip(shifts, ranges, strict=True):
        channel = np.clip(frame.luma.astype(np.float32) + whole(shift, height, width), 0, 255)
        mask = mask & (channel >= low) & (channel <= high)
    thing = max((box_of(t) for t in things_in(mask, GAP)), key=lambda box: box.rank, default=None)
    if thing is None:
        return None
    for gap in (0, *GAPS):
        ring = largest_ring(mask, gap)
        if ring is None or SMALLER * box_of(ring).area < thing.area:
            continue
        # The same without pixels that lack a neighbour to the left, right, above or below.
        kept = largest_ring(ndimage.binary_erosion(mask), 0) if gap == 0 else None
        if kept is not None:
            without_necks = ndimage.binary_dilation(kept)
            if box_of(without_necks).contains(box_of(holes_of(ring))):
                return box_of(without_necks)
        return box_of(ring)
    return thing


def things_in(mask: np.ndarray, gap: int) -> Iterator[np.ndarray]:
    """The pixels of each thing: what is at most ``gap`` apart, as a mask of the frame's size."""
    wide = np.pad(mask, gap)
    grown = ndimage.grey_dilation(wide, size=(gap + 1, gap + 1))
    labels, count = ndimage.label(grown, np.ones((3, 3)))
    for label in range(1, count + 1):
        yield unpadded(wide & (labels == label), gap)


def unpadded(mask: np.ndarray, by: int) -> np.ndarray:
    return mask[by : mask.shape[0] - by, by : mask.shape[1] - by]


def holes_of(thing: np.ndarray, gap: int = 0) -> np.ndarray:
    """The holes of a thing that are large enough once its pixels are grown by half the gap."""
    grown = ndimage.grey_dilation(np.pad(thing, gap), size=(gap + 1, gap + 1))
    labels, _ = ndimage.label(ndimage.binary_fill_holes(grown) & ~grown)
    large = np.zeros_like(grown)
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        if min(rows.stop - rows.start, columns.stop - columns.start) >= HOLE:
            large |= labels == label
    return unpadded(large, gap)


def largest_ring(mask: np.ndarray, gap: int) -> np.ndarray | None:
    rings = [(thing, holes_of(thing, gap)) for thing in things_in(mask, gap)]
    rings = [(thing, holes) for thing, holes in rings if holes.any()]
    return max(rings, key=lambda ring: box_of(ring[1]).rank, default=(None, None))[0]


def box_of(mask: np.ndarray) -> Box:
    y, x = np.nonzero(mask)
    return Box(int(y.min()), int(x.min()), int(y.max()) + 1, int(x.max()) + 1)


def whole(chroma: np.ndarray, height: int, width: int) -> np.ndarray:
    return chroma.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


@pytest.mark.parametrize("size", [(64, 80), (63, 81), (1, 1)])
@pytest.mark.parametrize("bt709", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    "colour",
    [
        COLOUR,
        OutlineColour((200, 240), (90, 120), (10, 60), 100),
        OutlineColour((0, 255), (0, 255), (0, 255), -600),
        OutlineColour((300, 400), (0, 255), (0, 255), 0),
    ],
    ids=["default", "narrow", "everything", "beyond white"],
)
def test_box_is_that_of_the_definition(
    colour: OutlineColour, full_range: bool, bt709: bool, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(5)
    for _ in range(10):
        frame = patchy_frame(rng, *size, full_range=full_range, bt709=bt709)
        found = find_thing(frame, colour)
        assert (found and found.box) == outline_by_definition(frame, colour)


# ru_maxrss would not do: a process starts with that of the one that it was forked from.
GROWTH = """
import re, sys
from pathlib import Path
from dist_train.data.raw.video import Video
from dist_train.data.raw.outline import OutlineColour, crop_to_outline
peaks = []
for path in sys.argv[1:]:
    crop_to_outline(Video(Path(path)), OutlineColour(), most=0)
    status = Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]))
print(1024 * (peaks[1] - peaks[0]))
"""


@pytest.mark.parametrize(
    ("box", "first_shown", "share"),
    [
        pytest.param(Box(100, 120, 160, 190), 159, 0.25, id="frames before the first box"),
        pytest.param(Box(4, 4, 508, 508), 0, 1.4, id="a clip as large as its frames"),
    ],
)
def test_no_frame_is_held_in_vain(tmp_path: Path, box: Box, first_shown: int, share: float) -> None:
    """Memory grows by the crop, not by the frames before it, and not by a second crop."""
    size, depth = 512, 160
    frames = np.full((depth, size, size, 3), 30, np.uint8)
    frames[first_shown:] = outlined_frames([box], height=size, width=size)
    path = write_video(tmp_path / "a.mp4", frames, options={"preset": "ultrafast"})
    frames = outlined_frames([box] * 4, height=size, width=size)
    short = write_video(tmp_path / "short.mp4", frames, options={"preset": "ultrafast"})
    command = [sys.executable, "-c", GROWTH, str(short), str(path)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < share * depth * size * size


@pytest.mark.parametrize("level", [40, 250])
def test_grey_clip_has_no_outline(tmp_path: Path, level: int) -> None:
    frames = outlined_frames([None] * 3)
    frames[:, 20:60, 20:60] = level
    path = write_video(tmp_path / "a.mp4", frames)
    with pytest.raises(RoiError, match=r"a.mp4: no outline found in any frame.*--roi none"):
        crop_to_outline(Video(path), COLOUR)


def test_truly_grey_encoding_has_no_outline(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", outlined_frames([START] * 3), pix_fmt="gray")
    with pytest.raises(RoiError):
        crop_to_outline(Video(path), COLOUR)


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DecodeError):
        crop_to_outline(Video(tmp_path / "a.mp4"), COLOUR)


def test_box_arithmetic() -> None:
    box = Box(2, 3, 5, 9)
    assert box.union(Box(0, 4, 4, 12)) == Box(0, 3, 5, 12)
    assert box.contains(Box(2, 3, 4, 9))
    assert not box.contains(Box(2, 2, 4, 9))
    assert box.grown(3, 7, 10) == Box(0, 0, 7, 10)
    assert box.cut(np.arange(100, dtype=np.uint8).reshape(10, 10)).shape == (3, 6)


def speck(frames: np.ndarray) -> None:
    """Two pixels of the colour, as a light of the instrument or a defect of the camera is."""
    frames[:, 40:41, 50:52] = ORANGE


def block_in_one_frame(frames: np.ndarray) -> None:
    frames[7, 30:60, 40:80] = ORANGE


def block(frames: np.ndarray) -> None:
    frames[:, 30:60, 40:80] = ORANGE


def line(frames: np.ndarray) -> None:
    frames[:, 40:43, 20:100] = ORANGE


def letters(frames: np.ndarray) -> None:
    """A small word, with holes of its own."""
    for left in (20, 32, 44):
        frames[:, 10:20, left : left + 10] = ORANGE
        frames[:, 12:18, left + 2 : left + 8] = 45


@pytest.mark.parametrize("draw", [speck, block_in_one_frame, block, line, letters])
def test_what_is_no_outline(tmp_path: Path, draw: Callable[[np.ndarray], None]) -> None:
    frames = outlined_frames([None] * 20)
    draw(frames)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    with pytest.raises(RoiError, match="no outline found in any frame"):
        crop_to_outline(Video(path), COLOUR)


def test_an_outline_is_there_in_most_frames(tmp_path: Path) -> None:
    frames = outlined_frames([START] * 9 + [None] * 9)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    with pytest.raises(RoiError, match="an outline is found in only 9 of 18 frames"):
        crop_to_outline(Video(path), COLOUR)
    write_video(path, frames[:-1], codec="ffv1")
    clip, found = crop_to_outline(Video(path), COLOUR)
    assert len(clip) == 17
    assert furthest_side(found, START) <= 2


def test_specks_do_not_widen_the_box(tmp_path: Path) -> None:
    """In frames without the outline, what is there instead is none."""
    frames = outlined_frames([START] * 12 + [None] * 3)
    frames[12:, 85:89, 110:114] = ORANGE
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    _, found = crop_to_outline(Video(path), COLOUR)
    assert furthest_side(found, START) <= 2


WITHOUT_INSIDE = {
    "a line": [((20, 20), (90, 80))],
    "a cross": [((40, 48), (90, 48)), ((64, 20), (64, 76))],
    "a slanted cross": [((20, 20), (90, 80)), ((20, 80), (90, 20))],
    "an angle": [((20, 20), (20, 80)), ((20, 80), (90, 80))],
    "an arrow": [((20, 20), (90, 80)), ((90, 80), (90, 60)), ((90, 80), (70, 80))],
}


@pytest.mark.parametrize("kind", WITHOUT_INSIDE)
def test_what_goes_around_nothing_is_no_outline(tmp_path: Path, kind: str) -> None:
    frames = outlined_frames([None] * 3)
    for frame in frames:
        for start, end in WITHOUT_INSIDE[kind]:
            cv2.line(frame, start, end, ORANGE, 3)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    with pytest.raises(RoiError, match="no outline found in any frame"):
        crop_to_outline(Video(path), COLOUR)


def test_an_outline_that_leaves_the_frame_or_lacks_a_part(tmp_path: Path) -> None:
    for number, (middle, end) in enumerate([((0, 48), 360), ((127, 95), 360), ((64, 48), 270)]):
        frames = outlined_frames([None] * 3)
        for frame in frames:
            cv2.ellipse(frame, middle, (40, 30), 0, 0, end, ORANGE, 3)
        path = write_video(tmp_path / f"{number}.mkv", frames, codec="ffv1")
        _, found = crop_to_outline(Video(path), COLOUR)
        left, right = max(middle[0] - 41, 0), min(middle[0] + 42, 128)
        top, bottom = max(middle[1] - 31, 0), min(middle[1] + 32, 96)
        assert furthest_side(found, Box(top, left, bottom, right)) <= 2


def test_least_size_is_a_setting(tmp_path: Path) -> None:
    box = Box(20, 30, 34, 46)
    path = write_video(tmp_path / "a.mkv", outlined_frames([box] * 3), codec="ffv1")
    with pytest.raises(RoiError):
        crop_to_outline(Video(path), COLOUR)
    _, found = crop_to_outline(Video(path), COLOUR, least=10)
    assert furthest_side(found, box) <= 2


@pytest.mark.parametrize("box", [Box(-20, 30, 30, 84), Box(40, 90, 100, 150)])
def test_an_outline_that_leaves_the_frame(tmp_path: Path, box: Box) -> None:
    """It encloses nothing, and is open all the same."""
    path = write_video(tmp_path / "a.mkv", outlined_frames([box] * 3), codec="ffv1")
    _, found = crop_to_outline(Video(path), COLOUR)
    inside = Box(max(box.top, 0), max(box.left, 0), min(box.bottom, 96), min(box.right, 128))
    assert furthest_side(found, inside) <= 2
