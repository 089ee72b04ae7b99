"""The clips that the model was most confidently wrong about, as pictures for the report."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dist_train.data.pictures import as_picture, legend
from dist_train.data.types import GREY, Volume
from dist_train.evaluation.report_run import Run

Clips = Callable[[str], Volume]
"""Returns the native frames, [D, H, W] or [D, H, W, C], of the clip of a key."""

CLIPS, FRAMES, HEIGHT = 4, 8, 128
"""Clips of each kind of mistake, frames of a clip, and the largest height of a frame."""


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
    shown = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(np.int64))
    height, width = clip.shape[1:3]
    scale = min(1.0, HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pictures = as_picture(clip[shown], channels)
    frames = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures]
    white = (255, 255, 255)
    gaps = [cv2.copyMakeBorder(f, 0, 0, 2, 0, cv2.BORDER_CONSTANT, value=white) for f in frames]
    strip = np.hstack(gaps)[:, 2:]
    # OpenCV writes blue, green and red.
    strip = strip if strip.ndim == 2 else np.ascontiguousarray(strip[..., ::-1])
    png = cv2.imencode(".png", strip)[1].tobytes()
    image = "data:image/png;base64," + base64.b64encode(png).decode()
    colours = f"; {told}" if (told := legend(channels)) else ""
    return f"{len(shown)} of {len(clip)} frames{colours}", image
