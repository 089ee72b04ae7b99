"""Time stamps of frames -> the time between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Greatest distance of a time stamp from that of a fixed rate, in intervals.
MOST = 0.01


def interval_of(stamps: Sequence[int | None], unit: float) -> tuple[float | None, bool]:
    """Return the time between frames in seconds, None if it is not fixed, and whether it varies.

    It is fixed if each stamp is that of a fixed rate, within 1 % of the interval, or within one
    unit, as stamps are rounded. Without stamps, or with one frame, nothing is known.

    Args:
        stamps: one for each frame, in order.
        unit: of the stamps, in seconds.
    """
    if len(stamps) < 2 or any(stamp is None for stamp in stamps):
        return None, False
    times = np.array(stamps, np.float64)
    step = (times[-1] - times[0]) / (len(times) - 1)
    off = np.abs(times - times[0] - step * np.arange(len(times))).max()
    if step <= 0 or off > max(1, MOST * step):
        return None, True
    # The digits beyond are those of rounding.
    return float(f"{step * unit:.9g}"), False
