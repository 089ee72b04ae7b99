"""The clips that the model was most confidently wrong about, as pictures for the report."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dist_train.data.pictures import film_strip, legend
from dist_train.data.types import GREY, Volume
from dist_train.evaluation.report_run import Run

Clips = Callable[[str], Volume]
"""Returns the native frames, [D, H, W] or [D, H, W, C], of the clip of a key."""

CLIPS = 4
"""Clips of each kind of mistake."""


class Mistake(NamedTuple):
    """A clip that the model got wrong."""

    filename: str
    label: int
    probability: float
    frames: str
    image: str
    """Evenly spaced frames side by side, as a data URI."""


def worst_mistakes(
    run: Run, clips: Clips, channels: Sequence[str] = GREY
) -> dict[str, list[Mistake]]:
    """The most confident mistakes, by title."""
    if run.evaluation is None or run.predictions is None:
        return {}
    table, called = run.predictions, run.predictions["calibrated"] > run.evaluation.threshold
    worst = {
        "False positives": table[called & (table["label"] == 0)].nlargest(CLIPS, "probability"),
        "False negatives": table[~called & (table["label"] == 1)].nsmallest(CLIPS, "probability"),
    }
    return {
        title: [
            Mistake(name, int(label), probability, *_strip(clips(key), channels))
            for key, name, label, probability in rows[
                ["key", "filename", "label", "probability"]
            ].itertuples(index=False)
        ]
        for title, rows in worst.items()
    }


def _strip(clip: Volume, channels: Sequence[str]) -> tuple[str, str]:
    """How many frames are shown and in which colours, and the picture; large frames are shrunk."""
    strip, shown = film_strip(clip, channels)
    # OpenCV writes blue, green and red.
    strip = strip if strip.ndim == 2 else np.ascontiguousarray(strip[..., ::-1])
    png = cv2.imencode(".png", strip)[1].tobytes()
    image = "data:image/png;base64," + base64.b64encode(png).decode()
    colours = f"; {told}" if (told := legend(channels)) else ""
    return f"{shown} of {len(clip)} frames{colours}", image
