"""The outline's box: within two pixels of the truth, whatever the compression and clutter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import ROOT, environment
from make_media import ORANGE, drifting, outlined_frames, union_of, write_video
from scipy import ndimage

from dist_train.data.raw.frame import Frame
from dist_train.data.raw.outline import (
    MARGIN,
    Box,
    OutlineColour,
    crop_to_outline,
    find_outline,
    find_thing,
)
from dist_train.data.raw.video import Video
from dist_train.data.synthetic.drawing import draw_clip, render_clip
from dist_train.errors import RoiError

COLOUR = OutlineColour()
START = Box(20, 30, 70, 84)
ALL = slice(None)
Draw = Callable[[np.ndarray], None]


def furthest_side(found: Box, truth: Box) -> int:
    return max(abs(a - b) for a, b in zip(astuple(found), astuple(truth), strict=True))


def box_of_video(tmp_path: Path, frames: np.ndarray, **how: Any) -> Box:
    """The box that is found in a video of these frames, without loss if not said otherwise."""
    how = how or {"codec": "ffv1"}
    path = write_video(tmp_path / "a.mkv", frames, **how)
    return crop_to_outline(Video(path), COLOUR)[1]


@pytest.mark.parametrize("crf", ["18", "35"])
@pytest.mark.parametrize("start", [START, Box(11, 17, 36, 101), Box(3, 41, 90, 66)])
def test_union_is_within_two_pixels(tmp_path: Path, crf: str, start: Box) -> None:
    boxes = drifting(start, 6, step=(0, 1))
    found = box_of_video(tmp_path, outlined_frames(boxes), options={"crf": crf})
    assert furthest_side(found, union_of(boxes)) <= 2


@pytest.mark.parametrize("bt709", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
def test_an_even_patch_has_the_colour_that_was_encoded(
    tmp_path: Path, full_range: bool, bt709: bool
) -> None:
    frames = np.full((1, 64, 64, 3), 40, np.uint8)
    frames[:, 16:48, 24:40] = (224, 107, 34)
    path = write_video(
        tmp_path / "a.mp4", frames, options={"qp": "0"}, full_range=full_range, bt709=bt709
    )
    (frame,) = Video(path)
    near = OutlineColour(red=(221, 227), green=(104, 110), blue=(31, 37))
    found = find_thing(frame, near)
    assert found is not None
    assert not found.is_open
    # Chroma of half the resolution blends with the ground at the rim.
    assert furthest_side(found.box, Box(16, 24, 48, 40)) <= 2
    assert find_thing(frame, replace(near, red=(230, 240))) is None


def test_odd_frame_with_the_outline_at_its_last_pixel(tmp_path: Path) -> None:
    box = Box(31, 47, 81, 101)
    found = box_of_video(tmp_path, outlined_frames([box] * 2, height=81, width=101))
    assert furthest_side(found, box) <= 2
    assert (found.bottom, found.right) == (81, 101)


@pytest.mark.parametrize("colour", [(255, 20, 20), (224, 107, 34), (20, 60, 250)])
def test_blobs_elsewhere_do_not_disturb(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = outlined_frames([START] * 4)
    frames[:, 4:14, 100:120] = colour
    frames[2:, 80:92, 5:25] = colour
    assert furthest_side(box_of_video(tmp_path, frames, options={"crf": "23"}), START) <= 2


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


REDS = np.array([(224, 107, 34), (255, 70, 40), (235, 120, 60), (200, 70, 50)])


def scatter_blobs(frames: np.ndarray, rng: np.random.Generator) -> None:
    """Draw eleven bright discs of the outline's red or one like it, 3 to 12 pixels from the line or
    further away; every third has a core that is too bright for the outline's colour."""
    line = (frames[..., 0].astype(np.int16) - frames[..., 2] > 40).any(axis=0)
    distance = ndimage.distance_transform_edt(~line)
    for number in range(11):
        radius, gap = rng.uniform(2, 10), rng.uniform(3, 12)
        is_near = abs(distance - radius - gap) < 1
        places = is_near if number < 5 and is_near.any() else distance > radius + 3
        middle = rng.choice(np.argwhere(places))
        colour = REDS[rng.integers(len(REDS))] + rng.integers(-12, 13, 3)
        paint(frames, middle, radius, colour.clip(0, 255))
        if number % 3 == 0:
            paint(frames, middle, radius / 2, (255, 235, 200))


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


SMALL = Box(50, 70, 74, 94)


def blob_larger_than_the_outline(core: bool) -> np.ndarray:
    frames = outlined_frames([SMALL] * 3)
    paint(frames, (30, 30), 16)
    if core:
        # A hole, but smaller than that in the outline.
        paint(frames, (30, 30), 4, (255, 245, 220))
    return frames


def broken_outline_beside_a_blob_with_a_core() -> np.ndarray:
    """No gap closes the line, so nothing encloses the vessel, but the blob has a hole."""
    frames = outlined_frames([START] * 3)
    frames[:, 40:48, 76:] = 30
    paint(frames, (12, 112), 9)
    paint(frames, (12, 112), 5, (255, 245, 220))
    return frames


def blob_on_the_outline() -> np.ndarray:
    """It looks like a part of the line, so the box is too large there, and never too small."""
    frames = outlined_frames([START] * 3)
    paint(frames, (45, 86), 6)
    return frames


def outline_in_three_pieces() -> np.ndarray:
    frames = outlined_frames([START] * 3)
    for gap in (slice(28, 44), slice(76, 92)):
        frames[:, 42:48, gap] = 30
    frames[:, 62:80, 54:60] = 30
    return frames


def thick() -> np.ndarray:
    """A line of five pixels around a rectangle, which fills ``START``."""
    frames = outlined_frames([None] * 3)
    frames[:, 20:70, 30:84] = ORANGE
    frames[:, 25:65, 35:79] = 45
    return frames


def blob_attached_by_a_neck() -> np.ndarray:
    frames = thick()
    paint(frames, (45, 93), 6)
    frames[:, 44:46, 82:90] = ORANGE
    return frames


def line_as_thin_as_a_neck() -> np.ndarray:
    """What is left of the outline without necks is a ring of its own."""
    frames = thick()
    frames[:, 20:70, 60:65] = ORANGE
    frames[:, 22:68, 40:50] = 45
    return frames


CLUTTER = {
    "a larger blob": (partial(blob_larger_than_the_outline, core=False), SMALL),
    "a larger blob with a bright core": (partial(blob_larger_than_the_outline, core=True), SMALL),
    "a broken line": (broken_outline_beside_a_blob_with_a_core, START),
    "a blob on the line": (blob_on_the_outline, replace(START, right=93)),
    "three pieces": (outline_in_three_pieces, START),
    "a neck": (blob_attached_by_a_neck, START),
    "a thin line": (line_as_thin_as_a_neck, START),
}


@pytest.mark.parametrize("kind", CLUTTER)
def test_clutter_around_the_outline(tmp_path: Path, kind: str) -> None:
    make, expected = CLUTTER[kind]
    assert furthest_side(box_of_video(tmp_path, make()), expected) <= 2


CROPPED = {
    "drifts down": (drifting(Box(80, 90, 120, 140), 12, step=(4, 0)), False),
    "drifts up and left": (drifting(Box(80, 90, 120, 140), 12, step=(-3, -5)), False),
    "first seen in the third frame": (
        [None, None, *drifting(START, 5, step=(1, 2)), None],
        True,
    ),
}


@pytest.mark.parametrize("kind", CROPPED)
def test_crop_equals_a_brute_force_crop(tmp_path: Path, kind: str) -> None:
    boxes, stays_in_window = CROPPED[kind]
    path = write_video(tmp_path / "a.mp4", outlined_frames(boxes, height=200, width=240))
    found = [find_outline(frame, COLOUR) for frame in Video(path)]
    union = union_of(found)
    first = next(box for box in found if box is not None)
    assert first.grown(MARGIN, 200, 240).contains(union) == stays_in_window
    clip, box = crop_to_outline(Video(path), COLOUR)
    assert box == union
    np.testing.assert_array_equal(clip, np.stack([union.cut(f.luma) for f in Video(path)]))


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
def test_colour_is_that_of_the_definition(
    colour: OutlineColour, full_range: bool, bt709: bool
) -> None:
    """A frame of one 2x2 block is found if its R, G and B by the standard are in the ranges."""
    rng = np.random.default_rng(5)
    red_cr, green_cb, green_cr, blue_cb = (
        (1.5748, -0.1873, -0.4681, 1.8556) if bt709 else (1.402, -0.3441, -0.7141, 1.772)
    )
    for _ in range(500):
        y, cb, cr = rng.integers((60, 40, 128), (200, 160, 240)).astype(np.uint8)
        planes = np.full((2, 2), y), np.full((1, 1), cb), np.full((1, 1), cr)
        frame = Frame(*planes, full_range, bt709)
        scale = np.float32(1.0 if full_range else 255 / 224)
        u, v = ((np.float32(chroma) - 128) * scale for chroma in (cb, cr))
        shifts = red_cr * v, green_cb * u + green_cr * v, blue_cb * u
        rgb = [np.clip(np.float32(frame.luma[0, 0]) + shift, 0, 255) for shift in shifts]
        ranges = (colour.red, colour.green, colour.blue)
        is_inside = all(low <= c <= high for c, (low, high) in zip(rgb, ranges, strict=True))
        expected = is_inside and shifts[0] - shifts[2] >= colour.red_over_blue
        assert (find_thing(frame, colour) is not None) == expected


# ru_maxrss would not do: a process starts with that of the one that it was forked from.
GROWTH = """
import re, sys
from pathlib import Path
from dist_train.data.raw.video import Video
from dist_train.data.raw.outline import OutlineColour, crop_to_outline
peaks = []
for path in sys.argv[1:]:
    crop_to_outline(Video(Path(path)), OutlineColour())
    status = Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]))
print(1024 * (peaks[1] - peaks[0]))
"""


@pytest.mark.parametrize(
    ("box", "first_shown", "share"),
    [
        pytest.param(Box(100, 120, 160, 190), 70, 0.25, id="frames before the first box"),
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


def rectangles(*slices: tuple[slice, slice], colour: Any = ORANGE, t: slice = ALL) -> Draw:
    def draw(frames: np.ndarray) -> None:
        for rows, columns in slices:
            frames[t, rows, columns] = colour

    return draw


def lines(*ends: tuple[tuple[int, int], tuple[int, int]]) -> Draw:
    def draw(frames: np.ndarray) -> None:
        for frame in frames:
            for start, end in ends:
                cv2.line(frame, start, end, ORANGE, 3)

    return draw


def letters(frames: np.ndarray) -> None:
    """A small word, with holes of its own."""
    for left in (20, 32, 44):
        frames[:, 10:20, left : left + 10] = ORANGE
        frames[:, 12:18, left + 2 : left + 8] = 45


BLOCK = slice(30, 60), slice(40, 80)
NO_OUTLINE = {
    "grey": rectangles(BLOCK, colour=250),
    # As a light of the instrument or a defect of the camera is.
    "speck": rectangles((slice(40, 41), slice(50, 52))),
    "block": rectangles(BLOCK),
    "block in one frame": rectangles(BLOCK, t=slice(7, 8)),
    "letters": letters,
    "straight line": rectangles((slice(40, 43), slice(20, 100))),
    "slanted line": lines(((20, 20), (90, 80))),
    "cross": lines(((40, 48), (90, 48)), ((64, 20), (64, 76))),
    "slanted cross": lines(((20, 20), (90, 80)), ((20, 80), (90, 20))),
    "angle": lines(((20, 20), (20, 80)), ((20, 80), (90, 80))),
    "arrow": lines(((20, 20), (90, 80)), ((90, 80), (90, 60)), ((90, 80), (70, 80))),
}


@pytest.mark.parametrize("kind", NO_OUTLINE)
def test_what_is_no_outline(tmp_path: Path, kind: str) -> None:
    frames = outlined_frames([None] * 10)
    NO_OUTLINE[kind](frames)
    with pytest.raises(RoiError, match=r"a.mkv: no outline found in any frame.*--roi none"):
        box_of_video(tmp_path, frames)


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
    """In frames without the outline, a speck is none."""
    frames = outlined_frames([START] * 12 + [None] * 3)
    frames[12:, 85:89, 110:114] = ORANGE
    assert furthest_side(box_of_video(tmp_path, frames), START) <= 2


@pytest.mark.parametrize(
    ("middle", "end"), [((0, 48), 360), ((127, 95), 360), ((64, 0), 360), ((64, 48), 270)]
)
def test_an_outline_that_leaves_the_frame_or_lacks_a_part(
    tmp_path: Path, middle: tuple[int, int], end: int
) -> None:
    frames = outlined_frames([None] * 3)
    for frame in frames:
        cv2.ellipse(frame, middle, (40, 30), 0, 0, end, ORANGE, 3)
    left, right = max(middle[0] - 41, 0), min(middle[0] + 42, 128)
    top, bottom = max(middle[1] - 31, 0), min(middle[1] + 32, 96)
    assert furthest_side(box_of_video(tmp_path, frames), Box(top, left, bottom, right)) <= 2


def test_least_size_is_a_setting(tmp_path: Path) -> None:
    box = Box(20, 30, 34, 46)
    path = write_video(tmp_path / "a.mkv", outlined_frames([box] * 3), codec="ffv1")
    with pytest.raises(RoiError):
        crop_to_outline(Video(path), COLOUR)
    _, found = crop_to_outline(Video(path), COLOUR, least=10)
    assert furthest_side(found, box) <= 2
