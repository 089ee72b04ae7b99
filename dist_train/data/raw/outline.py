"""Outline colour -> a box in every frame -> their union -> the crop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from itertools import islice
from typing import Any

import cv2
import numpy as np

from dist_train.data.raw.frame import Frame
from dist_train.data.raw.grey import FULL_RANGE
from dist_train.data.raw.video import Video
from dist_train.data.types import Plane, Volume
from dist_train.errors import ConfigError, RoiError

# The outline drifts by a pixel or so, so the boxes of a clip hardly differ: a window this much
# larger than the first box nearly always holds the union, and only the window is kept in memory.
MARGIN = 24

# The challenge's smallest outlines are 22 pixels high. Specks of another colour in a blob are less.
HOLE = 4
# A blob may have a hole too, where it is too bright for the colour: beside a thing with a box more
# than this many times as large, what has a hole is not the outline.
SMALLER = 8
# Least height and width of an outline: the challenge's begin at 22 and 23. Compression and a broken
# line take some pixels away.
LEAST = 16
# More than this share of the frames must show the outline: what is in a few is something else.
MOST = 0.5
# A line, a cross or an arrow goes around nothing; an ellipse that lacks a quarter goes around a
# fifth of its box.
AROUND = 1 / 8
# How far apart, in pixels, the pieces of one thing may be; and of a line that compression broke.
GAP = 4
GAPS = (2, 4, 8)
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


@dataclass(frozen=True, slots=True)
class Box:
    """Pixel rectangle: rows ``top`` to ``bottom``, columns ``left`` to ``right``, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def union(self, other: Box) -> Box:
        return Box(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )

    def contains(self, other: Box) -> bool:
        return self.union(other) == self

    def grown(self, margin: int, height: int, width: int) -> Box:
        return Box(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, height),
            min(self.right + margin, width),
        )

    def moved(self, down: int, right: int) -> Box:
        return Box(self.top + down, self.left + right, self.bottom + down, self.right + right)

    def within(self, other: Box) -> Box:
        """The same rectangle, counted from the other one's corner."""
        return self.moved(-other.top, -other.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Greater for a larger box; of two as large, for the upper one, then the left one."""
        return self.area, -self.top, -self.left

    def cut(self, plane: Plane) -> Plane:
        return plane[self.slices]


@dataclass(frozen=True, slots=True)
class OutlineColour:
    """What counts as outline: ranges of R, G and B, and how much redder than blue it must be.

    The default holds the 5th to 95th percentile of the challenge's outline after compression
    (R 124-244, G 81-118, B 13-75) with room on each side. Grey tissue has no difference between
    red and blue at any brightness, which is what makes ``red_over_blue`` the selective test.
    """

    red: tuple[int, int] = (100, 255)
    green: tuple[int, int] = (50, 150)
    blue: tuple[int, int] = (0, 110)
    red_over_blue: int = 60

    @classmethod
    def parse(cls, text: str) -> OutlineColour:
        """Read "red=100:255,green=50:150,blue=0:110,red_over_blue=60", or some of these.

        Raises:
            ConfigError: it is not of that form, with levels from 0 to 255; ``red_over_blue`` may be
                negative, for an outline that is not red.
        """
        known = [field.name for field in fields(cls)]
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise _not_a_colour(part, f"Did you mean '{near[0]}'? " if near else "")
            if name in given:
                raise _not_a_colour(part, f"'{name}' is there twice. ")
            if name == "red_over_blue":
                if not re.fullmatch(r"-?\d{1,3}", value, re.ASCII) or abs(int(value)) > 255:
                    raise _not_a_colour(part, "It takes one number from -255 to 255. ")
                given[name] = int(value)
                continue
            ends = re.fullmatch(r"(\d{1,3}):(\d{1,3})", value, re.ASCII)
            if ends is None or not int(ends[1]) <= int(ends[2]) <= 255:
                raise _not_a_colour(part, "It takes the least and the greatest, from 0 to 255. ")
            given[name] = int(ends[1]), int(ends[2])
        return cls(**given)


def _not_a_colour(part: str, because: str) -> ConfigError:
    return ConfigError(
        f"'{part}' is no part of a colour",
        where="--colour",
        fix=f"{because}The form is red=100:255,green=50:150,blue=0:110,red_over_blue=60, or some "
        "of these.",
    )


@dataclass(frozen=True, slots=True)
class Found:
    """A thing of the colour: its box, and whether it is open inside, as a line around a vessel is.

    So is one that encloses a hole, or, where the line is broken or leaves the frame, goes around a
    part of its box.
    """

    box: Box
    is_open: bool

    def is_outline(self, least: int) -> bool:
        """Whether it is open, and at least so high and wide, in pixels."""
        height, width = self.box.bottom - self.box.top, self.box.right - self.box.left
        return self.is_open and min(height, width) >= least


def find_outline(frame: Frame, colour: OutlineColour, least: int = LEAST) -> Box | None:
    """The box of the outline in one frame, or None; at least ``least`` pixels high and wide."""
    found = find_thing(frame, colour)
    return found.box if found is not None and found.is_outline(least) else None


def find_thing(frame: Frame, colour: OutlineColour) -> Found | None:
    """What is most like an outline in one frame, or None.

    A pixel is of the colour if its R, G and B, in float32 from luma and the chroma of its 2x2 block
    (ITU-R BT.601 or BT.709), are: cut to 0 and 255 for the ranges, and as they come out for how
    much redder than blue it is. Such pixels make a thing where no more than a gap of others, in
    the chessboard distance, lies between them.

    - The outline goes around the vessel, a blob does not: of the things that enclose holes, of at
      least ``HOLE`` pixels in both directions, it is the one whose holes have the largest box.
    - Compression may break the line. So the gap is none at first, and if that gives no outline,
      each of ``GAPS`` in turn.
    - A blob has a hole where it is too bright for the colour. So what has a hole does not count
      beside a thing, by the gap ``GAP`` and with a hole or not, whose box is more than ``SMALLER``
      times as large. If nothing counts, as where the outline leaves the frame, that thing is taken.
    - What hangs on an unbroken line by a neck of one or two pixels is no part of it, unless the
      line itself is so thin.

    A blob that touches the line in more than a neck is part of it, and widens the box by what
    sticks out.

    Works in the decoder's own planes: a first test runs at a quarter of the pixels, and what passes
    it tells the part of the frame in which luma is looked at.
    """
    accepted = _accepted(colour, frame.full_range, frame.bt709)
    # A look-up for each pixel takes four times as long as these, which leave little to look up.
    coarse = cv2.subtract(frame.cr, frame.cb) >= accepted.least_excess
    reddish = _box(*cv2.boundingRect(coarse.view(np.uint8)))
    if reddish.area == 0:
        return None
    least_cr = cv2.LUT(reddish.cut(frame.cb), accepted.least_cr)
    candidates = cv2.compare(reddish.cut(frame.cr), least_cr, cv2.CMP_GE)
    part = _box(*cv2.boundingRect(candidates)).moved(reddish.top, reddish.left)
    if part.area == 0:
        return None
    height, width = frame.cr.shape
    at_edge = part.top == 0, part.left == 0, part.bottom == height, part.right == width
    found = _outline(_of_the_colour(frame, part, accepted), at_edge)
    if found is None:
        return None
    return Found(found.box.moved(2 * part.top, 2 * part.left), found.is_open)


def crop_to_outline(
    video: Video, colour: OutlineColour, least: int = LEAST, most: float = MOST
) -> tuple[Volume, Box]:
    """The clip cut to the union of its outline boxes: uint8 [D, h, w] and the box.

    Only a window around the first box is kept while the file is decoded. What this misses, the
    frames before the first box, or the whole clip should the outline leave the window, is cut in a
    second decoding, so memory is that of the window at most.

    Args:
        least: pixels that an outline is high and wide, at least.
        most: share of the frames, more than which must show one.

    Raises:
        RoiError: too few frames show an outline.
        DecodeError: the file does not decode.
    """
    union: Box | None = None
    window: Box | None = None
    shown = missed = 0
    kept: list[Plane] = []
    for frame in video:
        box = find_outline(frame, colour, least)
        if box is not None:
            shown += 1
            union = box if union is None else union.union(box)
            window = window or box.grown(MARGIN, *frame.y.shape)
        if window is None:
            missed += 1
        else:
            kept.append(frame.grey(*window.slices))
    lack = lacks_outline(shown, video.frames_decoded, least, most)
    if union is None or window is None or lack:
        raise RoiError(
            str(lack),
            where=video.where,
            fix="Look at it with 'dist-train inspect', or prepare with --roi none.",
        )
    if not window.contains(union):
        window, missed = union, video.frames_decoded
        kept.clear()
    again = islice(Video(video.path, video.where, video.bits), missed)
    kept = [frame.grey(*window.slices) for frame in again] + kept
    return stack_planes(kept, union.within(window)), union


def lacks_outline(shown: int, frames: int, least: int, most: float = MOST) -> str | None:
    """What is wrong with a clip of which so many frames show an outline; None if nothing is."""
    if shown > most * frames:
        return None
    if shown:
        return f"an outline is found in only {shown} of {frames} frames"
    return f"no outline found in any frame, of {least} pixels or more"


def stack_planes(planes: list[Plane], box: Box) -> Volume:
    """``box`` of each plane, uint8 [D, h, w]. Empties the list, so as not to hold a clip twice."""
    clip = np.empty((len(planes), box.bottom - box.top, box.right - box.left), np.uint8)
    # From the last to the first: freed at its end, the heap shrinks.
    for t in reversed(range(len(clip))):
        clip[t] = box.cut(planes.pop())
    return clip


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The luma, as it is coded, that makes a colour an outline's, for every chroma.

    ``low``, ``high``: uint8 [256, 256] over Cb and Cr, ends included; low > high where no luma
    does. ``least_cr``: uint8 [256], for each Cb a Cr below which no luma does. ``least_excess``:
    Cr less Cb, or 0 where that is negative, below which no luma does.
    """

    low: np.ndarray
    high: np.ndarray
    least_cr: np.ndarray
    least_excess: int


@cache
def _accepted(colour: OutlineColour, full_range: bool, bt709: bool) -> _Accepted:
    shifts = _rgb_over_luma(full_range, bt709)
    ranges = (colour.red, colour.green, colour.blue)
    redder = shifts[0] - shifts[2] >= colour.red_over_blue
    low, high = np.full((256, 256), 255, np.uint8), np.zeros((256, 256), np.uint8)
    levels = np.arange(256, dtype=np.uint8)
    for level, luma in zip(levels, levels if full_range else FULL_RANGE, strict=True):
        inside = redder.copy()
        for shift, (least, most) in zip(shifts, ranges, strict=True):
            channel = np.clip(np.float32(luma) + shift, 0, 255)
            inside &= (channel >= least) & (channel <= most)
        low[inside] = np.minimum(low[inside], level)
        high[inside] = level
    possible = low <= high
    least_cr = np.where(possible.any(axis=1), possible.argmax(axis=1), 255).astype(np.uint8)
    cb, cr = np.nonzero(possible)
    least_excess = max(0, int((cr - cb).min(initial=255)))
    return _Accepted(low, high, least_cr, least_excess)


def _rgb_over_luma(full_range: bool, bt709: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R - Y, G - Y and B - Y over Cb and Cr, float32 (ITU-R BT.601 or BT.709)."""
    red, green_cb, green_cr, blue = (
        (1.5748, -0.1873, -0.4681, 1.8556) if bt709 else (1.402, -0.3441, -0.7141, 1.772)
    )
    scale = 1.0 if full_range else 255 / 224
    cb, cr = np.meshgrid(*2 * [(np.arange(256, dtype=np.float32) - 128) * scale], indexing="ij")
    return red * cr, green_cb * cb + green_cr * cr, blue * cb


def _of_the_colour(frame: Frame, part: Box, accepted: _Accepted) -> np.ndarray:
    """Where a part of a frame, in 2x2 blocks, is of the colour: uint8 [2h, 2w], 255 or 0."""
    height, width = 2 * (part.bottom - part.top), 2 * (part.right - part.left)
    luma = frame.y[2 * part.top : 2 * part.bottom, 2 * part.left : 2 * part.right]
    rows, columns = luma.shape
    chroma = part.cut(frame.cb).astype(np.uint16) << 8 | part.cut(frame.cr)
    low, high = (
        cv2.resize(level.take(chroma), (width, height), interpolation=cv2.INTER_NEAREST)
        for level in (accepted.low, accepted.high)
    )
    above = cv2.compare(luma, low[:rows, :columns], cv2.CMP_GE)
    below = cv2.compare(luma, high[:rows, :columns], cv2.CMP_LE)
    pixels = cv2.bitwise_and(above, below)
    if luma.shape != (height, width):
        # The last blocks of an odd size have fewer pixels.
        lacks = 0, height - rows, 0, width - columns
        pixels = cv2.copyMakeBorder(pixels, *lacks, cv2.BORDER_CONSTANT, value=0)
    return np.asarray(pixels)


@dataclass(frozen=True, slots=True)
class _Ring:
    """A thing that encloses holes: its box, and the box of its holes."""

    box: Box
    holes: Box


def _outline(pixels: np.ndarray, at_edge: tuple[bool, bool, bool, bool]) -> Found | None:
    """What is most like an outline in a mask, uint8 [h, w], of the pixels that have its colour.

    Args:
        at_edge: whether the mask's top, left, bottom and right are those of the frame.
    """
    everything = _box(*cv2.boundingRect(pixels))
    if everything.area == 0:
        return None
    ring = _largest_ring(pixels)
    # Nearly always there is little else, and no need to look at what it is.
    if ring is not None and SMALLER * ring.box.area >= everything.area:
        return Found(_without_necks(ring, pixels), is_open=True)
    thing = _largest_thing(pixels)
    if ring is not None and SMALLER * ring.box.area >= thing.area:
        return Found(_without_necks(ring, pixels), is_open=True)
    for gap in GAPS:
        ring = _largest_ring(pixels, gap)
        if ring is not None and SMALLER * ring.box.area >= thing.area:
            return Found(ring.box, is_open=True)
    height, width = pixels.shape
    sides = thing.top == 0, thing.left == 0, thing.bottom >= height - 1, thing.right >= width - 1
    leaves = [side and edge for side, edge in zip(sides, at_edge, strict=True)]
    return Found(thing, is_open=_goes_around(thing.cut(pixels) > 0, leaves))


def _goes_around(pixels: np.ndarray, leaves: Sequence[bool]) -> bool:
    """Whether a thing without a hole fills less than half of its box, and goes around at least
    ``AROUND`` of it: has pixels above, below, to the left and to the right of that.

    Args:
        pixels: bool [h, w].
        leaves: whether it leaves the frame at the top, left, bottom and right: as good as a line.
    """
    around = ~pixels
    for axis, (first, last) in enumerate(zip(leaves[:2], leaves[2:], strict=True)):
        if not first:
            around &= np.logical_or.accumulate(pixels, axis)
        if not last:
            around &= np.flip(np.logical_or.accumulate(np.flip(pixels, axis), axis), axis)
    return bool(2 * pixels.sum() < pixels.size and around.sum() >= AROUND * pixels.size)


def _without_necks(ring: _Ring, pixels: np.ndarray) -> Box:
    """The ring's box, without blobs that hang on it by a neck of one or two pixels."""
    # What is beyond the mask is not of the colour.
    thinner = cv2.erode(pixels, CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    kept = _largest_ring(thinner)
    if kept is None:
        return ring.box
    box = kept.box.grown(1, *pixels.shape)
    # Where the line itself is so thin, that may leave a part of the outline only.
    return box if box.contains(ring.holes) else ring.box


def _largest_ring(pixels: np.ndarray, gap: int = 0) -> _Ring | None:
    """The ring whose holes have the largest box."""
    contours, parents = _contours(pixels, gap)
    holes: dict[int, Box] = {}
    for contour, parent in zip(contours, parents, strict=True):
        if parent < 0:
            continue
        # The contour of a hole runs on the pixels around it.
        left, top, width, height = cv2.boundingRect(contour)
        if min(width, height) - 2 >= HOLE:
            hole = _box(left + 1, top + 1, width - 2, height - 2)
            holes[parent] = hole.union(holes.get(parent, hole))
    if not holes:
        return None
    largest = max(holes, key=lambda parent: holes[parent].rank)
    return _Ring(_ungrown(contours[largest], gap), holes[largest])


def _largest_thing(pixels: np.ndarray) -> Box:
    """The largest box of a thing, with gaps of ``GAP``, in a mask that is not empty."""
    contours, _ = _contours(pixels, GAP)
    return max((_ungrown(contour, GAP) for contour in contours), key=lambda box: box.rank)


def _contours(pixels: np.ndarray, gap: int) -> tuple[Sequence[np.ndarray], list[int]]:
    """The contours of things and holes, and for a hole the number of the thing around it, else -1.

    Args:
        gap: how many pixels, an even number, may lie between those of a thing. The mask is grown by
            half of it, and so are the things; they count from the corner of the grown mask.
    """
    if gap:
        half = gap // 2
        # Grown by half the gap, what it separates touches; closing would leave gaps in slanted
        # lines. The border is for things at the edge of the frame.
        pixels = cv2.copyMakeBorder(pixels, half, half, half, half, cv2.BORDER_CONSTANT, value=0)
        pixels = cv2.dilate(pixels, np.ones((gap + 1, gap + 1), np.uint8))
    contours, tree = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return contours, [] if tree is None else tree[0, :, 3].tolist()


def _ungrown(contour: np.ndarray, gap: int) -> Box:
    """The box of a thing's own pixels, counted from the corner of the mask."""
    left, top, width, height = cv2.boundingRect(contour)
    return _box(left, top, width - gap, height - gap)


def _box(left: int, top: int, width: int, height: int) -> Box:
    return Box(top, left, top + height, left + width)
