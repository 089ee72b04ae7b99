"""Outline colour -> a box in every frame -> their union -> the crop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import islice

import cv2
import numpy as np

from dist_train.data.decode import FULL_RANGE, Frame, Plane, Video, Volume
from dist_train.errors import RoiError

# The outline drifts by a pixel or so, so the boxes of a clip hardly differ: a window this much
# larger than the first box nearly always holds the union, and only the window is kept in memory.
MARGIN = 24


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

    def within(self, other: Box) -> Box:
        """The same rectangle, counted from the other one's corner."""
        return Box(
            self.top - other.top,
            self.left - other.left,
            self.bottom - other.top,
            self.right - other.left,
        )

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

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


def find_outline(frame: Frame, colour: OutlineColour) -> Box | None:
    """The box of the outline in one frame, or None.

    A pixel is of the colour if its R, G and B, in float32 from luma and the chroma of its 2x2 block
    (ITU-R BT.601 or BT.709), are. Of several things of this colour the one with the largest box is
    taken: the outline goes around the vessel, a blob does not.

    Works in the decoder's own planes: a first test runs at a quarter of the pixels and leaves few
    blocks, whose luma is then looked at.
    """
    accepted = _accepted(colour, frame.full_range, frame.bt709)
    candidates = cv2.compare(frame.cr, cv2.LUT(frame.cb, accepted.least_cr), cv2.CMP_GE)
    left, top, width, height = cv2.boundingRect(candidates)
    if width == 0:
        return None
    # With a rim of two, which closing the mask cannot reach over, a cut mask closes as a whole one.
    around = Box(top, left, top + height, left + width).grown(2, *candidates.shape)
    rows, columns = np.nonzero(around.cut(candidates))
    chroma = around.cut(frame.cb)[rows, columns], around.cut(frame.cr)[rows, columns]
    blocks = _blocks(frame.y, around)[rows, columns]
    low, high = accepted.low[chroma], accepted.high[chroma]
    inside = (blocks >= low[:, None, None]) & (blocks <= high[:, None, None])
    mask = np.zeros((around.bottom - around.top, around.right - around.left), dtype=np.uint8)
    mask[rows, columns] = inside.any(axis=(1, 2))
    chosen = _largest_box(mask)
    if chosen is None:
        return None
    # Back to single pixels: those of the colour in the blocks of the chosen component.
    block, down, right = np.nonzero(inside & chosen[rows, columns, None, None])
    y = 2 * (around.top + rows[block]) + down
    x = 2 * (around.left + columns[block]) + right
    frame_height, frame_width = frame.y.shape
    # The last block of an odd size repeats its last pixel.
    bottom = min(int(y.max()) + 1, frame_height)
    return Box(int(y.min()), int(x.min()), bottom, min(int(x.max()) + 1, frame_width))


def crop_to_outline(video: Video, colour: OutlineColour) -> tuple[Volume, Box]:
    """The clip cut to the union of its outline boxes: uint8 [D, h, w] and the box.

    Only a window around the first box is kept while the file is decoded. What this misses, the
    frames before the first box, or the whole clip should the outline leave the window, is cut in a
    second decoding, so memory is that of the window at most.

    Raises:
        RoiError: no frame shows an outline.
        DecodeError: the file does not decode.
    """
    union: Box | None = None
    window: Box | None = None
    missed = 0
    kept: list[Plane] = []
    for frame in video:
        box = find_outline(frame, colour)
        if box is not None:
            union = box if union is None else union.union(box)
            window = window or box.grown(MARGIN, *frame.y.shape)
        if window is None:
            missed += 1
        else:
            kept.append(frame.grey(*window.slices))
    if union is None or window is None:
        raise RoiError(
            "no outline found in any frame",
            where=video.path,
            fix="Look at it with 'dist-train inspect', or prepare with --roi none.",
        )
    if not window.contains(union):
        window, missed = union, video.frames_decoded
        kept.clear()
    again = islice(Video(video.path), missed)
    kept = [frame.grey(*window.slices) for frame in again] + kept
    return stack_planes(kept, union.within(window)), union


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
    does. ``least_cr``: uint8 [256], for each Cb a Cr below which no luma does.
    """

    low: np.ndarray
    high: np.ndarray
    least_cr: np.ndarray


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
            channel = np.float32(luma) + shift
            inside &= (channel >= least) & (channel <= most)
        low[inside] = np.minimum(low[inside], level)
        high[inside] = level
    possible = low <= high
    least_cr = np.where(possible.any(axis=1), possible.argmax(axis=1), 255).astype(np.uint8)
    return _Accepted(low, high, least_cr)


def _rgb_over_luma(full_range: bool, bt709: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R - Y, G - Y and B - Y over Cb and Cr, float32 (ITU-R BT.601 or BT.709)."""
    red, green_cb, green_cr, blue = (
        (1.5748, -0.1873, -0.4681, 1.8556) if bt709 else (1.402, -0.3441, -0.7141, 1.772)
    )
    scale = 1.0 if full_range else 255 / 224
    cb, cr = np.meshgrid(*2 * [(np.arange(256, dtype=np.float32) - 128) * scale], indexing="ij")
    return red * cr, green_cb * cb + green_cr * cr, blue * cb


def _blocks(y: Plane, around: Box) -> np.ndarray:
    """The 2x2 luma pixels of each chroma pixel of a box, uint8 [h, w, 2, 2]."""
    height, width = around.bottom - around.top, around.right - around.left
    part = y[2 * around.top : 2 * around.bottom, 2 * around.left : 2 * around.right]
    if part.shape != (2 * height, 2 * width):
        lacks = 2 * height - part.shape[0], 2 * width - part.shape[1]
        part = cv2.copyMakeBorder(part, 0, lacks[0], 0, lacks[1], cv2.BORDER_REPLICATE)
    return part.reshape(height, 2, width, 2).swapaxes(1, 2)


def _largest_box(mask: np.ndarray) -> np.ndarray | None:
    """The component of a uint8 mask that has the largest bounding box, as a boolean mask."""
    # Compression opens small gaps in a thin line; a 3x3 closing joins them again.
    closed = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    if count < 2:
        return None
    areas = stats[1:, cv2.CC_STAT_WIDTH].astype(np.int64) * stats[1:, cv2.CC_STAT_HEIGHT]
    return np.asarray(labels == 1 + int(areas.argmax()))
