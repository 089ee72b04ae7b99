"""The random changes of one clip, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dist_train.data.orientation import IDENTITY, Matrix, Orientation

Pictures = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]
Kernel = np.ndarray[tuple[int], np.dtype[np.float64]]
NO_PICTURES: Pictures = np.empty((0, 0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class Draw:
    """The changes of every frame (H x W) of a clip, in the order of application.

    Attributes:
        orientation: flips and quarter turns.
        affine: float64 [2, 3], maps (x, y, 1) of a pixel to its new position; outside is black.
            None moves nothing.
        is_displaced: whether pictures[0] and pictures[1] are the x and y of each pixel's source
            position; outside is black.
        contrast, brightness: a value v becomes contrast * v + brightness, clipped to 0 to 255.
        gamma: then v becomes 255 * (v / 255) ** gamma.
        kernel: float64 [taps], a blur along both axes, mirrored at the edge pixels. None does not
            blur.
        is_noisy: whether pictures[-1] is noise, in grey levels, to be added (to uint8 truncated to
            whole levels); the sum is clipped to 0 to 255.
        is_reversed: whether the order of frames is reversed.
        pictures: float32 [0 to 3, H, W].
    """

    orientation: Orientation = IDENTITY
    affine: Matrix | None = None
    is_displaced: bool = False
    contrast: float = 1.0
    brightness: float = 0.0
    gamma: float = 1.0
    kernel: Kernel | None = None
    is_noisy: bool = False
    is_reversed: bool = False
    pictures: Pictures = field(default_factory=lambda: NO_PICTURES)
