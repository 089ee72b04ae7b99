"""Outline colour -> a box in every frame -> their union -> the crop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np

from dist_train.data.raw.frame import Frame
from dist_train.data.raw.grey import FULL_RANGE
from dist_train.data.raw.video import Video
from dist_train.errors import ConfigError, RoiError

# An outline drifts by a few pixels within a clip. A window this much larger than the first box
# nearly always holds the union of all, and only the window is kept in memory.
MARGIN = 24
# Least height and width of an outline. The challenge's begin at 22 and 23; compression and a
# broken line take some pixels away.
LEAST = 16
# An outline must be in more than this share of the frames.
MOST = 0.5
# Least height and width of a hole. Specks of another colour in a blob are smaller.
HOLE = 4
# A ring is no outline if the box of another thing is more than this many times as large: a blob
# has a hole where it is too bright for the colour.
SMALLER = 8
# Share of its box that a thing without a hole must go around. A line, a cross or an arrow goes
# around nothing, an ellipse that lacks a quarter around a fifth.
AROUND = 1 / 8
# Largest distance in pixels between the pieces of one thing, and of a line that compression broke.
GAP = 4
GAPS = (2, 4, 8)
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_COLOUR_PART = re.compile(
    r"(red|green|blue)=(\d{1,3}):(\d{1,3})|(red_over_blue)=(-?\d{1,3})", re.ASCII
)


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
        """The box with a margin on each side, cut at a frame of this size."""
        return Box(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, height),
            min(self.right + margin, width),
        )

    def moved(self, down: int, right: int) -> Box:
        return Box(self.top + down, self.left + right, self.bottom + down, self.right + right)

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts boxes by size; of two equal ones, the upper, then the left one is greater."""
        return self.area, -self.top, -self.left

    def cut(self, plane: np.ndarray) -> np.ndarray:
        return plane[self.slices]


@dataclass(frozen=True, slots=True)
class OutlineColour:
    """Ranges of R, G and B of an outline's pixels, and the least excess of red over blue.

    The default holds the 5th to 95th percentile of the challenge's outlines after compression
    (R 124-244, G 81-118, B 13-75), with room on each side. ``red_over_blue`` is the selective test:
    grey tissue has as much red as blue at any brightness. It is negative for other colours.
    """

    red: tuple[int, int] = (100, 255)
    green: tuple[int, int] = (50, 150)
    blue: tuple[int, int] = (0, 110)
    red_over_blue: int = 60

    @classmethod
    def parse(cls, text: str) -> OutlineColour:
        """Read "red=100:255,green=50:150,blue=0:110,red_over_blue=60", or some of its parts.

        Raises:
            ConfigError: the text has another form, or a level is not from 0 to 255.
        """
        given: dict[str, Any] = {}
        for part in text.split(","):
            match = _COLOUR_PART.fullmatch(part.strip())
            name = match and (match[1] or match[4])
            if match and match[1] and int(match[2]) <= int(match[3]) <= 255 and name not in given:
                given[match[1]] = int(match[2]), int(match[3])
            elif match and match[4] and abs(int(match[5])) <= 255 and name not in given:
                given[match[4]] = int(match[5])
            else:
                raise ConfigError(
                    f"'{part}' is no part of a colour",
                    where="--colour",
                    fix="The form is red=100:255,green=50:150,blue=0:110,red_over_blue=60, or some "
                    "of these: the least and the greatest level, from 0 to 255, and for "
                    "red_over_blue a number from -255 to 255.",
                )
        return cls(**given)


class Found(NamedTuple):
    """Connected pixels of the outline's colour.

    ``is_open``: they enclose a hole or, where the line is broken or leaves the frame, go around a
    part of their box.
    """

    box: Box
    is_open: bool


def find_outline(frame: Frame, colour: OutlineColour, least: int = LEAST) -> Box | None:
    """Return the box of the outline in a frame, None if none is ``least`` pixels high and wide."""
    found = find_thing(frame, colour)
    if found is None or not found.is_open:
        return None
    height, width = found.box.bottom - found.box.top, found.box.right - found.box.left
    return found.box if min(height, width) >= least else None


def find_thing(frame: Frame, colour: OutlineColour) -> Found | None:
    """Return what is most like an outline in a frame, None if no pixel has its colour.

    The R, G and B of a pixel are computed in float32 from its luma and the chroma of its 2x2 block
    (ITU-R BT.601 or BT.709). They are clipped to 0 and 255 for the ranges, and not clipped for
    ``red_over_blue``. Pixels of the colour whose chessboard distance is at most a gap are one
    thing.

    - Of the things with holes of at least ``HOLE`` pixels in both directions, the one whose holes
      have the largest box is chosen: an outline encloses the vessel, a blob does not.
    - The gap is 0 at first, and then each of ``GAPS``, as compression may break the line.
    - A thing with a hole is passed over beside a thing (by the gap ``GAP``, with or without a
      hole) whose box is more than ``SMALLER`` times as large. If none is left, that large thing is
      returned: an outline that leaves the frame has no hole.
    - What is attached to an unbroken line by a neck of one or two pixels is cut off, unless the
      line itself is as thin.

    A blob that touches the line in more than a neck is part of it, and widens the box.

    It works in the decoder's own planes: a test of the chroma, at a quarter of the pixels, gives
    the part of the frame whose luma is tested.
    """
    accepted = _accepted(colour, frame.full_range, frame.bt709)
    reddish = cv2.subtract(frame.cr, frame.cb) >= accepted.least_excess
    part = _bounding_box(reddish.view(np.uint8))
    if part.area == 0:
        return None
    height, width = frame.cr.shape
    at_edge = part.top == 0, part.left == 0, part.bottom == height, part.right == width
    found = _most_like_outline(_mask(frame, part, accepted), at_edge)
    if found is None:
        return None
    return Found(found.box.moved(2 * part.top, 2 * part.left), found.is_open)


def crop_to_outline(
    video: Video, colour: OutlineColour, least: int = LEAST
) -> tuple[np.ndarray, Box]:
    """Return the clip cut to the union of its outline boxes, and that box.

    The clip is uint8 [D, h, w], or of the pixels that the video was asked for.

    While the file is decoded, only a window around the first box is kept. Frames before the first
    box, or all frames if a box leaves the window, are cut in a second decoding.

    Raises:
        RoiError: too few frames show an outline.
        DecodeError: the file does not decode.
    """
    union: Box | None = None
    window: Box | None = None
    shown = missed = 0
    kept: list[np.ndarray] = []
    for frame in video:
        box = find_outline(frame, colour, least)
        if box is not None:
            shown += 1
            union = box if union is None else union.union(box)
            window = window or box.grown(MARGIN, *frame.y.shape)
        if window is None:
            missed += 1
        else:
            kept.append(frame.part(*window.slices))
    lack = lacks_outline(shown, video.frames_decoded, least)
    if union is None or window is None or lack:
        raise RoiError(
            str(lack),
            where=video.where,
            fix="Look at it with 'dist-train inspect', or prepare with --roi none.",
        )
    if not window.contains(union):
        window, missed = union, video.frames_decoded
        kept.clear()
    again = islice(video.again(), missed)
    kept = [frame.part(*window.slices) for frame in again] + kept
    return stack_planes(kept, union.moved(-window.top, -window.left)), union


def lacks_outline(shown: int, frames: int, least: int) -> str | None:
    """Say what is wrong with a clip that shows an outline in ``shown`` of its frames, or None."""
    if shown > MOST * frames:
        return None
    if shown:
        return f"an outline is found in only {shown} of {frames} frames"
    return f"no outline found in any frame, of {least} pixels or more"


def stack_planes(planes: list[np.ndarray], box: Box) -> np.ndarray:
    """Stack ``box`` of each plane, [D, h, w] or [D, h, w, C], and empty the list."""
    first = box.cut(planes[0])
    clip = np.empty((len(planes), *first.shape), first.dtype)
    del first
    # The heap shrinks only if it is freed from its end.
    for t in reversed(range(len(clip))):
        clip[t] = box.cut(planes.pop())
    return clip


class _Accepted(NamedTuple):
    """Coded values that give an outline's colour.

    ``low``, ``high``: least and greatest luma for each Cb and Cr, uint8 [256, 256]; low > high if
    there is none. ``least_excess``: least Cr - Cb with such a luma, at least 0.
    """

    low: np.ndarray
    high: np.ndarray
    least_excess: int


@cache
def _accepted(colour: OutlineColour, full_range: bool, bt709: bool) -> _Accepted:
    shifts = _rgb_minus_luma(full_range, bt709)
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
    cb, cr = np.nonzero(low <= high)
    return _Accepted(low, high, max(0, int((cr - cb).min(initial=255))))


def _rgb_minus_luma(full_range: bool, bt709: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R - Y, G - Y and B - Y for each Cb and Cr, float32 [256, 256] (ITU-R BT.601 or BT.709)."""
    red, green_cb, green_cr, blue = (
        (1.5748, -0.1873, -0.4681, 1.8556) if bt709 else (1.402, -0.3441, -0.7141, 1.772)
    )
    scale = 1.0 if full_range else 255 / 224
    cb, cr = np.meshgrid(*2 * [(np.arange(256, dtype=np.float32) - 128) * scale], indexing="ij")
    return red * cr, green_cb * cb + green_cr * cr, blue * cb


def _mask(frame: Frame, part: Box, accepted: _Accepted) -> np.ndarray:
    """Pixels of the colour in a part of a frame: uint8 [2h, 2w], 255 or 0.

    Args:
        part: counted in 2x2 blocks.
    """
    height, width = 2 * (part.bottom - part.top), 2 * (part.right - part.left)
    luma = frame.y[2 * part.top : 2 * part.bottom, 2 * part.left : 2 * part.right]
    rows, columns = luma.shape
    chroma = part.cut(frame.cb).astype(np.uint16) << 8 | part.cut(frame.cr)
    low, high = (
        cv2.resize(level.take(chroma), (width, height), interpolation=cv2.INTER_NEAREST)
        for level in (accepted.low, accepted.high)
    )
    # A frame of odd size has fewer pixels in its last blocks.
    pixels = np.zeros((height, width), np.uint8)
    cv2.bitwise_and(
        cv2.compare(luma, low[:rows, :columns], cv2.CMP_GE),
        cv2.compare(luma, high[:rows, :columns], cv2.CMP_LE),
        dst=pixels[:rows, :columns],
    )
    return pixels


class _Ring(NamedTuple):
    """The boxes of a thing and of its holes."""

    box: Box
    holes: Box


def _most_like_outline(pixels: np.ndarray, at_edge: tuple[bool, bool, bool, bool]) -> Found | None:
    """Apply the rules of ``find_thing`` to a mask, uint8 [h, w].

    Args:
        at_edge: whether the mask's top, left, bottom and right are those of the frame.
    """
    everything = _bounding_box(pixels)
    if everything.area == 0:
        return None
    ring = _largest_ring(pixels)
    # Usually the ring is nearly everything, and no other thing is larger.
    is_most = ring is not None and SMALLER * ring.box.area >= everything.area
    thing = everything if is_most else _largest_thing(pixels)
    for gap in (0, *GAPS):
        ring = _largest_ring(pixels, gap) if gap else ring
        if ring is not None and SMALLER * ring.box.area >= thing.area:
            return Found(ring.box if gap else _without_necks(ring, pixels), is_open=True)
    height, width = pixels.shape
    sides = thing.top == 0, thing.left == 0, thing.bottom >= height - 1, thing.right >= width - 1
    leaves = [side and edge for side, edge in zip(sides, at_edge, strict=True)]
    return Found(thing, is_open=_goes_around(thing.cut(pixels) > 0, leaves))


def _goes_around(pixels: np.ndarray, leaves: Sequence[bool]) -> bool:
    """Whether a thing fills less than half of its box, and has pixels on all four sides of at least
    ``AROUND`` of it.

    Args:
        pixels: bool [h, w], the thing's box.
        leaves: whether it leaves the frame at the top, left, bottom and right; that counts as a
            line there.
    """
    around = ~pixels
    for axis, (first, last) in enumerate(zip(leaves[:2], leaves[2:], strict=True)):
        if not first:
            around &= np.logical_or.accumulate(pixels, axis)
        if not last:
            around &= np.flip(np.logical_or.accumulate(np.flip(pixels, axis), axis), axis)
    return bool(2 * pixels.sum() < pixels.size and around.sum() >= AROUND * pixels.size)


def _without_necks(ring: _Ring, pixels: np.ndarray) -> Box:
    """The ring's box without blobs attached to it by a neck of one or two pixels."""
    thinner = cv2.erode(pixels, CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    kept = _largest_ring(thinner)
    if kept is None:
        return ring.box
    box = kept.box.grown(1, *pixels.shape)
    # If the line itself is as thin, only a part of the outline may be left.
    return box if box.contains(ring.holes) else ring.box


def _largest_ring(pixels: np.ndarray, gap: int = 0) -> _Ring | None:
    """The ring whose holes have the largest box."""
    contours, parents = _contours(pixels, gap)
    holes: dict[int, Box] = {}
    for contour, parent in zip(contours, parents, strict=True):
        # The contour of a hole runs on the pixels around it.
        hole = _bounding_box(contour, shrink=2)
        if parent >= 0 and min(hole.bottom - hole.top, hole.right - hole.left) >= HOLE:
            hole = hole.moved(1, 1)
            holes[parent] = hole.union(holes.get(parent, hole))
    if not holes:
        return None
    largest = max(holes, key=lambda parent: holes[parent].rank)
    return _Ring(_bounding_box(contours[largest], shrink=gap), holes[largest])


def _largest_thing(pixels: np.ndarray) -> Box:
    """The largest box of a thing, by the gap ``GAP``, in a mask that is not empty."""
    contours, _ = _contours(pixels, GAP)
    boxes = (_bounding_box(contour, shrink=GAP) for contour in contours)
    return max(boxes, key=lambda box: box.rank)


def _contours(pixels: np.ndarray, gap: int) -> tuple[Sequence[np.ndarray], list[int]]:
    """Return the contours of things and holes, and for each hole the number of its thing, else -1.

    Args:
        gap: an even number. Things are grown by half of it on each side, and contours count from
            the corner of the grown mask.
    """
    if gap:
        half = gap // 2
        # Grown by half the gap, the pieces of a thing touch. Closing would leave gaps in slanted
        # lines. The border keeps what grows beyond the edge of the frame.
        pixels = cv2.copyMakeBorder(pixels, half, half, half, half, cv2.BORDER_CONSTANT, value=0)
        pixels = cv2.dilate(pixels, np.ones((gap + 1, gap + 1), np.uint8))
    contours, tree = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return contours, [] if tree is None else tree[0, :, 3].tolist()


def _bounding_box(points: np.ndarray, shrink: int = 0) -> Box:
    """The box of a mask's pixels or a contour's points, less ``shrink`` at the bottom and right."""
    left, top, width, height = cv2.boundingRect(points)
    return Box(top, left, top + height - shrink, left + width - shrink)
