"""The report's charts, as SVG images that follow the reader's fonts and colour scheme."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from dist_train import metrics
from dist_train.evaluation.evaluate import Evaluation
from dist_train.evaluation.report_run import Run
from dist_train.metrics import Floats

# Colours of Okabe and Ito, which colour-blind readers can tell apart: (on white, on black).
COLOURS = {
    "ink": ("#1f2430", "#e8eaed"),
    "muted": ("#6b7280", "#9aa3af"),
    "grid": ("#e3e6ea", "#333943"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f0894a"),
    "green": ("#009e73", "#2fc79b"),
    "purple": ("#b0578d", "#dd93bd"),
}
INK, MUTED, GRID, BLUE, ORANGE, *_ = (light for light, _ in COLOURS.values())
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dist_train",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES = (0, (4, 3))
CURVE_BINS, CURVE_POINTS = 160, 500


Line = tuple[str, str, str]
"""A metric to draw: its name, the name of its colour, and its label or ""."""


def over_steps(
    run: Run,
    ylabel: str,
    *,
    by_step: Iterable[Line] = (),
    by_epoch: Iterable[Line] = (),
    limit: float | None = None,
    numbers: str | None = None,
) -> Axes:
    """A chart of metrics over the optimizer steps, on which resumes are marked.

    Args:
        by_step: drawn as the mean and the range of adjacent steps.
        by_epoch: drawn at the last step of each epoch, those of the train split dashed.
        limit: the largest good value, drawn as a line.
        numbers: format of the vertical axis, which then begins at 0.
    """
    axes = new_axes("optimizer step", ylabel)
    if limit is not None:
        axes.axhline(limit, color=ORANGE, linestyle=DASHES, linewidth=1, label="too much")
    for name, colour, label in by_step:
        values = run.series(name)
        if values.empty:
            continue
        group = np.arange(len(values)) * CURVE_BINS // max(len(values), CURVE_BINS)
        x, bins = pd.Series(values.index).groupby(group).mean(), values.groupby(group)
        light = COLOURS[colour][0]
        axes.fill_between(x, bins.min(), bins.max(), color=light, alpha=0.22, linewidth=0)
        axes.plot(x, bins.mean(), color=light, label=label)
    for name, colour, label in by_epoch:
        values = run.series(name)
        if values.empty:
            continue
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "solid"}
        if name.startswith("train/"):
            style = {"linestyle": (0, (2, 1.5))}
        axes.plot(values.index, values, color=COLOURS[colour][0], label=label, **style)
    axes.set_xlim(0, run.last_step * 1.02)
    if numbers is not None:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(numbers)
    for number, step in enumerate(run.resumed_from):
        resumed = "" if number else "resumed"
        axes.axvline(step, color=MUTED, linestyle=DASHES, linewidth=1, label=resumed)
    return axes


def precision_recall(clips: pd.DataFrame, e: Evaluation) -> Axes:
    """Precision against recall; average precision is the area under exactly these steps."""
    axes = unit_axes("recall", "precision")
    curve = metrics.precision_recall_curve(clips["probability"], clips["label"])
    axes.step(*thinned(*curve), color=BLUE, where="pre")
    axes.axhline(e.positives / e.clips, color=MUTED, linestyle=DASHES, linewidth=1)
    if e.precision is not None:
        axes.plot(e.recall, e.precision, "o", color=ORANGE, markersize=9)
    return axes


def roc(clips: pd.DataFrame, e: Evaluation) -> Axes:
    """The receiver operating characteristic."""
    axes = unit_axes("false positive rate", "true positive rate")
    axes.plot(*thinned(*metrics.roc_curve(clips["probability"], clips["label"])), color=BLUE)
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHES, linewidth=1)
    (tn, fp), _ = e.confusion
    axes.plot(fp / (fp + tn), e.recall, "o", color=ORANGE, markersize=9)
    return axes


def mcc_by_threshold(clips: pd.DataFrame, e: Evaluation) -> Axes:
    """MCC against the threshold of the calibrated probability."""
    axes = new_axes("threshold of the calibrated probability", "MCC", square=True)
    thresholds, values = thinned(*metrics.mcc_curve(clips["calibrated"], clips["label"]))
    # Below the lowest score every clip is called positive, which is an MCC of 0.
    axes.step([0, *thresholds, 1], [0, *values, values[-1]], color=BLUE, where="post")
    axes.axvline(e.threshold, color=ORANGE, linewidth=1.4, label=f"in use: {e.threshold:.3f}")
    axes.plot(e.threshold, e.mcc, "o", color=ORANGE, markersize=9)
    axes.set(xlim=(-0.02, 1.02))
    return axes


def reliability(clips: pd.DataFrame) -> Axes:
    """Observed against predicted frequency, raw and calibrated."""
    axes = unit_axes("predicted probability", "share of positives")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHES, linewidth=1)
    for name, label, form in (("probability", "raw", "o-"), ("calibrated", "calibrated", "s-")):
        predicted, observed, _ = metrics.reliability(clips[name], clips["label"])
        colour = BLUE if label == "raw" else ORANGE
        axes.plot(predicted, observed, form, color=colour, markersize=6, label=label)
    return axes


def thinned(*columns: ArrayLike) -> list[Floats]:
    """At most ``CURVE_POINTS`` points of a curve, with both ends."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    size = len(arrays[0])
    kept = np.unique(np.linspace(0, size - 1, min(size, CURVE_POINTS)).round().astype(np.int64))
    return [array[kept] for array in arrays]


def unit_axes(xlabel: str, ylabel: str) -> Axes:
    """Axes for two shares in 0..1."""
    axes = new_axes(xlabel, ylabel, square=True)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    return axes


def new_axes(xlabel: str, ylabel: str, *, square: bool = False) -> Axes:
    figure = Figure(figsize=(5.6, 4.6) if square else (5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0)
    return axes


def image(axes: Axes) -> str:
    """A chart as a data URI. Its colours are CSS variables of the reader's scheme."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=5, columnspacing=1.2, handlelength=1.6)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().replace("'DejaVu Sans'", FONTS)
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    light, dark = (
        ";".join(f"--{name}:{pair[scheme]}" for name, pair in COLOURS.items()) for scheme in (0, 1)
    )
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    svg = svg.replace("<defs>", style + "<defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
