"""Outline colour -> a box in every frame -> their union -> the crop."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dist_train.data.decode import Frame, Plane, Video, Volume
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

    def cut(self, plane: Plane) -> Plane:
        return plane[self.top : self.bottom, self.left : self.right]


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

    Works in the decoder's own planes: the chroma test runs at a quarter of the pixels, and only
    candidates are turned into RGB. Of several things of this colour the one with the largest box is
    taken: the outline goes around the vessel, a blob does not.
    """
    red_shift, green_shift, blue_shift = _rgb_over_luma(frame)
    candidates = red_shift - blue_shift >= colour.red_over_blue
    if not candidates.any():
        return None
    rows, columns = np.nonzero(candidates)
    luma = _luma_of_chroma(frame.luma, rows, columns)
    shifts = (red_shift, green_shift, blue_shift)
    inside = np.ones_like(luma, dtype=bool)
    for shift, (low, high) in zip(shifts, (colour.red, colour.green, colour.blue), strict=True):
        channel = luma + shift[rows, columns, None]
        inside &= (channel >= low) & (channel <= high)
    mask = np.zeros(candidates.shape, dtype=np.uint8)
    mask[rows, columns] = inside.any(axis=1)
    chosen = _largest_box(mask)
    if chosen is None:
        return None
    # Back to single pixels: the candidates of the chosen component, each with its 2x2 luma pixels.
    taken = inside & chosen[rows, columns, None]
    y = (2 * rows[:, None] + np.array([0, 0, 1, 1]))[taken]
    x = (2 * columns[:, None] + np.array([0, 1, 0, 1]))[taken]
    height, width = frame.luma.shape
    return Box(
        int(y.min()), int(x.min()), min(int(y.max()) + 1, height), min(int(x.max()) + 1, width)
    )


def crop_to_outline(video: Video, colour: OutlineColour) -> tuple[Volume, Box]:
    """The clip cut to the union of its outline boxes: uint8 [D, h, w] and the box.

    The file is decoded once and only a window around the first box is kept; should the outline
    leave the window, a second decoding cuts the then known box.

    Raises:
        RoiError: no frame shows an outline.
        DecodeError: the file does not decode.
    """
    union: Box | None = None
    window: Box | None = None
    kept: list[Plane] = []
    for frame in video:
        box = find_outline(frame, colour)
        if box is not None:
            union = box if union is None else union.union(box)
        if window is None and union is not None:
            window = union.grown(MARGIN, *frame.luma.shape)
            kept = [window.cut(earlier).copy() for earlier in kept]
        kept.append(frame.luma if window is None else window.cut(frame.luma).copy())
    if union is None or window is None:
        raise RoiError(
            "no outline found in any frame",
            where=video.path,
            fix="Look at it with 'dist-train inspect', or prepare with --roi none.",
        )
    if window.contains(union):
        top, left = union.top - window.top, union.left - window.left
        inner = Box(top, left, top + union.bottom - union.top, left + union.right - union.left)
        return np.stack([inner.cut(plane) for plane in kept]), union
    return np.stack([union.cut(frame.luma) for frame in video]), union


def _rgb_over_luma(frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R - Y, G - Y and B - Y at chroma resolution, float32 (ITU-R BT.601 or BT.709)."""
    red, green_cb, green_cr, blue = (
        (1.5748, -0.1873, -0.4681, 1.8556) if frame.bt709 else (1.402, -0.3441, -0.7141, 1.772)
    )
    cb = (frame.cb.astype(np.float32) - 128) * frame.chroma_scale
    cr = (frame.cr.astype(np.float32) - 128) * frame.chroma_scale
    return red * cr, green_cb * cb + green_cr * cr, blue * cb


def _luma_of_chroma(luma: Plane, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The 2x2 luma pixels of each chroma pixel, float32 [N, 4]; odd edges repeat the last pixel."""
    height, width = luma.shape
    below = np.minimum(2 * rows + 1, height - 1)
    right = np.minimum(2 * columns + 1, width - 1)
    corners = [
        luma[2 * rows, 2 * columns],
        luma[2 * rows, right],
        luma[below, 2 * columns],
        luma[below, right],
    ]
    return np.stack(corners, axis=1).astype(np.float32)


def _largest_box(mask: np.ndarray) -> np.ndarray | None:
    """The component of a uint8 mask that has the largest bounding box, as a boolean mask."""
    # Compression opens small gaps in a thin line; a 3x3 closing joins them again.
    closed = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    if count < 2:
        return None
    areas = stats[1:, cv2.CC_STAT_WIDTH].astype(np.int64) * stats[1:, cv2.CC_STAT_HEIGHT]
    return np.asarray(labels == 1 + int(areas.argmax()))
