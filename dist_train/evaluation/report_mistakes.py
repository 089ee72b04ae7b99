"""The clips that the model was most confidently wrong about, as pictures for the report."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dist_train.data.pictures import film_strip, legend
from dist_train.data.types import GREY, Volume
from dist_train.evaluation.report_run import Run
from dist_train.evaluation.target_evaluation import TargetEvaluation
from dist_train.evaluation.target_table import scored
from dist_train.metrics import Floats
from dist_train.targets import Target

Clips = Callable[[str], Volume]
"""Returns the native frames, [D, H, W] or [D, H, W, C], of the clip of a key."""

CLIPS = 4
"""Clips of each kind of mistake."""
#: Most labels, or values, whose mistakes are shown.
MOST_SHOWN = 10


class Mistake(NamedTuple):
    """A clip that the model got wrong."""

    filename: str
    told: str
    """Its label, and what the model says of it."""
    frames: str
    image: str
    """Evenly spaced frames side by side, as a data URI."""


def worst_mistakes(
    run: Run, clips: Clips, channels: Sequence[str] = GREY
) -> dict[str, list[Mistake]]:
    """The most confident mistakes, by title."""
    if run.evaluation is None or run.predictions is None:
        return {}
    if isinstance(run.evaluation, TargetEvaluation):
        found = _worst_of_target(run.predictions, run.evaluation)
        return {
            title: [Mistake(name, told, *_strip(clips(key), channels)) for key, name, told in worst]
            for title, worst in found.items()
        }
    table, called = run.predictions, run.predictions["calibrated"] > run.evaluation.threshold
    names = run.evaluation.classes
    worst = {
        "False positives": table[called & (table["label"] == 0)].nlargest(CLIPS, "probability"),
        "False negatives": table[~called & (table["label"] == 1)].nsmallest(CLIPS, "probability"),
    }
    return {
        title: [
            Mistake(
                name,
                f"label {names[int(label)]}, probability {probability:.3f}",
                *_strip(clips(key), channels),
            )
            for key, name, label, probability in rows[
                ["key", "filename", "label", "probability"]
            ].itertuples(index=False)
        ]
        for title, rows in worst.items()
    }


def _worst_of_target(
    table: pd.DataFrame, e: TargetEvaluation
) -> dict[str, list[tuple[str, str, str]]]:
    """Key, file name and description of the worst clips, by title: those surely called another
    class; of each of the labels with the most clips, those far on the wrong side; of each value,
    those far from the truth."""
    clips, found = scored(table, Target(e.kind, e.classes)), {}
    names, own = np.array(e.classes, object), table[["key", "filename"]].to_numpy(object)

    def add(title: str, size: Floats, wrong: NDArray[np.bool_], told: Callable[[int], str]) -> None:
        order = [int(n) for n in np.argsort(-size, kind="stable") if wrong[n]][:CLIPS]
        found[title] = [(*own[n], told(n)) for n in order]

    if clips.target.is_coded:
        sure, called = clips.calibrated.max(axis=1), clips.calibrated.argmax(axis=1)
        add(
            "Called another class",
            sure,
            called != clips.truth,
            lambda n: f"label {names[clips.truth[n]]}, called {names[called[n]]} by {sure[n]:.3f}",
        )
        return found
    for k, name in list(enumerate(e.classes))[:MOST_SHOWN]:
        score, truth = clips.probability[:, k], clips.truth[:, k]
        if e.kind == "regression":
            away = np.abs(score - truth)
            told = lambda n, s=score, t=truth: f"label {t[n]:.4g}, predicted {s[n]:.4g}"  # noqa: E731
            add(f"{name}: farthest from the truth", away, away > 0, told)
        else:
            called = clips.calibrated[:, k] > (e.per_class[k].threshold or 0.0)
            told = lambda n, s=score, t=truth: f"label {t[n]}, probability {s[n]:.3f}"  # noqa: E731
            add(f"{name}: wrong", np.abs(score - truth), called != truth, told)
    return found


def _strip(clip: Volume, channels: Sequence[str]) -> tuple[str, str]:
    """How many frames are shown and in which colours, and the picture; large frames are shrunk."""
    strip, shown = film_strip(clip, channels)
    # OpenCV writes blue, green and red.
    strip = strip if strip.ndim == 2 else np.ascontiguousarray(strip[..., ::-1])
    png = cv2.imencode(".png", strip)[1].tobytes()
    image = "data:image/png;base64," + base64.b64encode(png).decode()
    colours = f"; {told}" if (told := legend(channels)) else ""
    return f"{shown} of {len(clip)} frames{colours}", image
