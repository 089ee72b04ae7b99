"""The eight orientations of a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np

Picture = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
AnyPicture = TypeVar("AnyPicture", bound=Picture)
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight orientations: transpose first, then reverse rows or columns."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    def flipped(self, *, rows: bool = False, columns: bool = False) -> Orientation:
        """This orientation, followed by a flip."""
        return replace(
            self,
            rows_reversed=self.rows_reversed ^ rows,
            columns_reversed=self.columns_reversed ^ columns,
        )

    def turned(self, times: int) -> Orientation:
        """This orientation, followed by quarter turns counterclockwise."""
        turned = self
        for _ in range(times):
            turned = Orientation(
                not turned.transposed, not turned.columns_reversed, turned.rows_reversed
            )
        return turned

    def apply(self, picture: AnyPicture) -> AnyPicture:
        """The oriented picture, uint8 [H, W] or [H, W, C]: contiguous, or the picture itself."""
        if self.transposed:
            picture = cv2.transpose(picture)
        if self.rows_reversed and self.columns_reversed:
            picture = cv2.flip(picture, -1)
        elif self.rows_reversed or self.columns_reversed:
            picture = cv2.flip(picture, 0 if self.rows_reversed else 1)
        return picture

    def matrix(self, height: int, width: int) -> Matrix:
        """The matrix from pixels (x, y, 1) of the picture to pixels of the result: float64 [3, 3].

        ``height`` and ``width`` are the size of the result.
        """
        matrix = np.eye(3)
        if self.transposed:
            matrix[:2] = matrix[[1, 0]]
        if self.columns_reversed:
            matrix[0] = [0, 0, width - 1] - matrix[0]
        if self.rows_reversed:
            matrix[1] = [0, 0, height - 1] - matrix[1]
        return matrix


IDENTITY = Orientation()
