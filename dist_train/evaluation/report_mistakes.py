"""The clips that the model was most confidently wrong about, as pictures for the report."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dist_train.evaluation.report_run import Run

Clips = Callable[[str], NDArray[np.uint8]]
"""Returns the native frames, uint8 [D, H, W], of the clip of a key."""

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


def worst_mistakes(run: Run, clips: Clips) -> dict[str, list[Mistake]]:
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
            Mistake(name, int(label), probability, *_strip(clips(key)))
            for key, name, label, probability in rows[
                ["key", "filename", "label", "probability"]
            ].itertuples(index=False)
        ]
        for title, rows in worst.items()
    }


def _strip(clip: NDArray[np.uint8]) -> tuple[str, str]:
    """How many frames are shown, and the picture; large frames are shrunk."""
    shown = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(np.int64))
    height, width = clip.shape[1:]
    scale = min(1.0, HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    frames = [cv2.resize(clip[number], size, interpolation=cv2.INTER_AREA) for number in shown]
    with_gaps = [cv2.copyMakeBorder(f, 0, 0, 2, 0, cv2.BORDER_CONSTANT, value=255) for f in frames]
    png = cv2.imencode(".png", np.hstack(with_gaps)[:, 2:])[1].tobytes()
    image = "data:image/png;base64," + base64.b64encode(png).decode()
    return f"{len(shown)} of {len(clip)} frames", image
