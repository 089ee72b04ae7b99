"""The report's charts of more than two classes, labels, or values."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from dist_train import metrics
from dist_train.class_metrics import METRICS_OF
from dist_train.evaluation.report_charts import (
    BLUE,
    COLOURS,
    DASHES,
    INK,
    MUTED,
    ORANGE,
    Line,
    new_axes,
    thinned,
    unit_axes,
)
from dist_train.evaluation.report_run import Run
from dist_train.evaluation.target_evaluation import TargetEvaluation
from dist_train.evaluation.target_table import Scored, scored
from dist_train.evaluation.target_text import TITLES
from dist_train.metrics import Floats
from dist_train.targets import Target

#: Most classes, or values, that are drawn.
MOST_CLASSES = 10
#: Most points of a cloud.
MOST_POINTS = 2000
#: With more classes, a matrix has no numbers in its cells.
MOST_NUMBERS = 12
#: A class's or value's name, its chart's caption, and the chart.
Chart = tuple[str, str, Axes]


def charts(run: Run) -> list[Chart]:
    """The charts of a run's predictions."""
    e = run.evaluation
    assert isinstance(e, TargetEvaluation)
    assert run.predictions is not None
    clips = scored(run.predictions, Target(e.kind, e.classes))
    if e.kind == "regression":
        return [
            one
            for v, name in enumerate(e.classes[:MOST_CLASSES])
            for one in (_against_truth(clips, v, name), _residuals(clips, v, name))
        ]
    found: list[Chart] = []
    if e.confusion is not None:
        caption = "Clips of each true class, by the class that they are called; shares of a row."
        found.append(("Confusion", caption, _confusion(np.array(e.confusion), e.classes)))
    shown = _largest(e)
    few = f" The {MOST_CLASSES} with the most clips." if len(e.classes) > MOST_CLASSES else ""
    noun = "label" if e.kind == "multilabel" else "class"
    rest = f"Each {noun} {'by itself' if noun == 'label' else 'against the rest'}.{few}"
    curves: tuple[tuple[str, str, str, Callable[..., tuple[Floats, Floats]]], ...] = (
        ("Receiver operating characteristic", "false positive rate", "true positive rate",
         metrics.roc_curve),
        ("Precision and recall", "recall", "precision", metrics.precision_recall_curve),
    )  # fmt: skip
    for title, xlabel, ylabel, curve in curves:
        drawn = unit_axes(xlabel, ylabel)
        for number, k in enumerate(shown):
            truth = clips.truth == k if clips.target.is_coded else clips.truth[:, k] == 1
            x, y = thinned(*curve(clips.probability[:, k], truth))
            step = "default" if curve is metrics.roc_curve else "steps-pre"
            drawn.plot(x, y, drawstyle=step, label=_short(e.classes[k]), **_style(number))
        found.append((title, rest, drawn))
    caption = "Ten bins of equal numbers of clips: of the predicted class, or of all labels."
    found.append(("Calibration", caption, _reliability(clips)))
    return found


def curves_of(run: Run) -> list[tuple[str, list[Line]]]:
    """What is drawn over the steps: the label of each axis, and its lines, of each metric."""
    return [
        (
            TITLES[name],
            [(f"val/{name}", "orange", "held out"), (f"train/{name}", "blue", "training")],
        )
        for name in METRICS_OF[run.kind]
    ]


def _largest(e: TargetEvaluation) -> list[int]:
    """The classes with the most clips, of those that some clips are of and some are not."""
    sizes = [c.clips for c in e.per_class]
    some = [k for k, size in enumerate(sizes) if 0 < size < e.clips]
    return sorted(sorted(some, key=lambda k: -sizes[k])[:MOST_CLASSES])


def _style(number: int) -> dict[str, Any]:
    colours = [COLOURS[name][0] for name in ("blue", "orange", "green", "purple", "ink")]
    return {
        "color": colours[number % len(colours)],
        "linestyle": "solid" if number < len(colours) else DASHES,
    }


def _short(name: str) -> str:
    # matplotlib hides labels that begin with "_", and reads "$" as mathematics.
    return textwrap.shorten(name, 24, placeholder="…").replace("$", r"\$").removeprefix("_")


def _confusion(counts: np.ndarray, names: tuple[str, ...]) -> Axes:
    axes = new_axes("called", "is", square=True)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A colour of the reader's scheme whose opacity is the share.
    colour = matplotlib.colors.LinearSegmentedColormap.from_list("shares", [BLUE + "00", BLUE])
    axes.imshow(shares, cmap=colour, vmin=0, vmax=1.4)
    axes.grid(visible=False)
    if len(names) > MOST_NUMBERS:
        return axes
    places = range(len(names))
    axes.set_xticks(places, [_short(name) for name in names], rotation=30, ha="right")
    axes.set_yticks(places, [_short(name) for name in names])
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=INK)
    return axes


def _reliability(clips: Scored) -> Axes:
    axes = unit_axes("predicted probability", "share of clips")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHES, linewidth=1)
    for scores, label, colour in (
        (clips.probability, "raw", BLUE),
        (clips.calibrated, "calibrated", ORANGE),
    ):
        if clips.target.is_coded:
            p, right = scores.max(axis=1), scores.argmax(axis=1) == clips.truth
        else:
            p, right = scores.ravel(), clips.truth.ravel()
        predicted, observed, _ = metrics.reliability(np.minimum(p, 1.0), right)
        axes.plot(predicted, observed, "o-", color=colour, markersize=6, label=label)
    return axes


def _against_truth(clips: Scored, v: int, name: str) -> Chart:
    truth, value = _cloud(clips, v)
    axes = new_axes("true", "predicted", square=True)
    axes.plot(truth, value, "o", color=BLUE, markersize=4, alpha=0.6)
    ends = [min(truth.min(), value.min()), max(truth.max(), value.max())]
    axes.plot(ends, ends, color=MUTED, linestyle=DASHES, linewidth=1)
    return f"{name}: predicted against true", "On the dashed line both are equal.", axes


def _residuals(clips: Scored, v: int, name: str) -> Chart:
    truth, value = _cloud(clips, v)
    axes = new_axes("true", "predicted less true", square=True)
    axes.plot(truth, value - truth, "o", color=ORANGE, markersize=4, alpha=0.6)
    axes.axhline(0, color=MUTED, linestyle=DASHES, linewidth=1)
    return f"{name}: residuals", "A slope shows values drawn towards their mean.", axes


def _cloud(clips: Scored, v: int) -> tuple[Floats, Floats]:
    """True and predicted values of evenly spaced clips, at most ``MOST_POINTS``."""
    rows = np.linspace(0, len(clips) - 1, min(len(clips), MOST_POINTS)).round().astype(np.int64)
    return clips.truth[rows, v], clips.probability[rows, v]
