"""One self-contained HTML page about a run: no network, no scripts, the same bytes every time."""

import base64
import io
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from dist_train import metrics
from dist_train.checkpoint.format import by_step
from dist_train.errors import FileError, RunError
from dist_train.evaluation.evaluate import (
    Evaluation,
    evaluate,
    how_calibrated,
    interval,
    is_same,
    read_predictions,
    rows,
)
from dist_train.evaluation.prediction_origin import check_origin
from dist_train.files import MIB, read_plain, write_whole
from dist_train.run.data import open_run_data
from dist_train.run.folder import CONFIG, EVALUATION, METRICS, PREDICTIONS
from dist_train.run.record import open_record, open_run
from dist_train.training.metrics_log import MOST_BYTES as MOST_OF_METRICS
from dist_train.training.metrics_log import parse_metrics

log = logging.getLogger(__name__)
Strips = Callable[[str], NDArray[np.uint8]]
Record = dict[str, Any]
Tile = tuple[str, str, str]
"""A headline figure: name, value, remark."""

# Okabe and Ito's colours, told apart by colour-blind readers: name -> (on white, on black). A
# figure is drawn in the first and refers to both, so that it follows the reader's colour scheme.
_COLOURS = {
    "ink": ("#1f2430", "#e8eaed"),
    "muted": ("#6b7280", "#9aa3af"),
    "grid": ("#e3e6ea", "#333943"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f0894a"),
    "green": ("#009e73", "#2fc79b"),
    "purple": ("#b0578d", "#dd93bd"),
}
_INK, _MUTED, _GRID, _BLUE, _ORANGE, _GREEN, _PURPLE = (light for light, _ in _COLOURS.values())
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dist_train",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "lines.linewidth": 1.8,
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_CURVE_BINS = 160
_STRIP_FRAMES = 8
_STRIP_HEIGHT = 128
_MISTAKES = 4
# In the loss, as in the log's warning.
_LARGEST_GAP = 0.3


@dataclass(frozen=True)
class Run:
    """What a run folder holds; None where a file is not there yet."""

    path: Path
    steps: list[Record]
    """The object of each optimizer step, ascending; a step redone after a resume counts once."""
    info: Record
    settings: str | None
    predictions: pd.DataFrame | None
    """The labelled clips of the evaluated split."""
    evaluation: Evaluation | None
    snapshots: int

    @property
    def resumed_from(self) -> list[int]:
        """The steps after which a later session went on."""
        sessions = self.info.get("sessions") or []
        points = [session.get("resumed_from_step") for session in sessions]
        return [point for point in points if point is not None]


@dataclass(frozen=True)
class Plot:
    """An image with its title, a sentence on how to read it, and its text for screen readers."""

    title: str
    caption: str
    image: str


@dataclass(frozen=True)
class Mistake:
    """A clip that the model got wrong."""

    filename: str
    label: int
    probability: float
    frames: str
    image: str


def report_run(run: Path, *, store_path: Path | None = None) -> Path:
    """Write the page with the pictures of the worst mistakes, and return its path.

    Args:
        store_path: where the run's own store is now, if it was moved.

    Raises:
        RunError: as ``write_report``; or settings or weights are not those that were trained with.
        StoreError: the store cannot be used, or is not as it was.
    """
    store = open_run_data(run, open_run(run), store_path=store_path).store
    return write_report(run, strips=lambda key: store.read(store.clip_of(key)))


def write_report(run: Path, *, out: Path | None = None, strips: Strips | None = None) -> Path:
    """Write the page.

    Args:
        run: the run folder. Without ``predictions.csv`` the page has the training curves, and says
            which command adds the rest.
        out: the page to write; by default ``report.html`` in the run folder.
        strips: gives the native frames, uint8 [D, H, W], of the clip of a key. None leaves out the
            pictures of the worst mistakes.

    Returns:
        The path of the page.

    Raises:
        RunError: the run has no metrics or an unreadable file, or its predictions have no
            evaluation that belongs to them.
    """
    record = read_run(run)
    with matplotlib.rc_context(_STYLE):
        page = _template().render(
            run=record,
            name=run.resolve().name,
            subtitle=_subtitle(record),
            headline=[_quality_tiles(record), _cost_tiles(record)],
            rows=rows(record.evaluation) if record.evaluation else [],
            curves=_learning_curves(record),
            gap=_large_gap(record),
            judgement=_judgement(record),
            mistakes=_mistakes(record, strips) if strips else None,
            speed=_speed(record),
            facts=_facts(record.info),
            sessions=record.info.get("sessions") or [],
            colours=_COLOURS,
        )
    out = run / "report.html" if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


def read_run(run: Path) -> Run:
    """Read a run folder, which may still be being written.

    Raises:
        RunError: as ``write_report``.
    """
    predictions = evaluation = None
    if os.path.lexists(run / PREDICTIONS):
        check_origin(run)
        evaluation = _evaluated_again(run)
        predictions = _evaluated(run / PREDICTIONS, evaluation)
    return Run(
        path=run,
        steps=_read_steps(run / METRICS),
        info=open_record(run),
        settings=_read_text(run / CONFIG) if os.path.lexists(run / CONFIG) else None,
        predictions=predictions,
        evaluation=evaluation,
        snapshots=len(by_step(run / "snapshots", ".safetensors")),
    )


def _read_steps(path: Path) -> list[Record]:
    if not os.path.lexists(path):
        raise RunError("the run has no metrics", where=path, fix="Train it with `dist-train train`")
    lines = _read(path, MOST_OF_METRICS).splitlines(keepends=True)
    steps: dict[int, Record] = {}
    for number, figures in enumerate(parse_metrics(lines), start=1):
        if figures is not None:
            steps[figures["step"]] = figures
        # The run may still be writing the last line.
        elif number < len(lines) or lines[-1].endswith(b"\n"):
            raise RunError(
                "the line is not as a step was written",
                where=f"{path}, line {number}",
                fix="Restore the file, or delete the line",
            )
    if not steps:
        raise RunError("no step has finished yet", where=path, fix="Wait for the first step")
    if lost := max(steps) - len(steps):
        log.warning("%s lacks the figures of %d steps", path, lost)
    return [steps[step] for step in sorted(steps)]


def _read(path: Path, most: int) -> bytes:
    try:
        return read_plain(path, most_bytes=most)
    except FileError as error:
        raise RunError(error.what, where=path) from None


def _read_text(path: Path) -> str:
    try:
        return _read(path, MIB).decode()
    except UnicodeDecodeError as error:
        raise RunError(f"this is no text ({error})", where=path) from None


def _read_evaluation(path: Path) -> Evaluation:
    if not os.path.lexists(path):
        raise RunError(
            "the predictions are not evaluated", where=path, fix="Run `dist-train evaluate` first"
        )
    try:
        return Evaluation.model_validate_json(_read(path, MIB))
    except ValidationError as error:
        raise RunError(
            "this is not an evaluation", where=path, fix="Run `dist-train evaluate` again"
        ) from error


def _evaluated_again(run: Path) -> Evaluation:
    """The figures, from the predictions themselves: ``evaluation.json`` says no more than whether
    the threshold was given."""
    path = run / PREDICTIONS
    said = _read_evaluation(run / EVALUATION)
    given = said.threshold if said.threshold_fitted_on is None else None
    evaluation = evaluate(path, threshold=given)
    if not is_same(evaluation.model_dump(), said.model_dump()):
        raise RunError(
            "evaluation.json beside it is of other predictions",
            where=path,
            fix="Run `dist-train evaluate` again",
        )
    return evaluation


def _evaluated(path: Path, evaluation: Evaluation) -> pd.DataFrame:
    frame = read_predictions(path)
    return frame[frame["label"].notna() & (frame["split"] == evaluation.split)]


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("dist_train.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


# ---- words and numbers --------------------------------------------------------------------------


def _subtitle(run: Run) -> str:
    parts = []
    if "model" in run.info:
        parts.append(_plain(run.info["model"]))
    if "parameters" in run.info:
        parts.append(f"{run.info['parameters'] / 1e6:,.1f} M parameters")
    parts.append(_count(run.steps[-1]["step"], "step"))
    parts.append(_count(len(_series(run.steps, "val/loss")[0]), "epoch"))
    return " · ".join(parts)


def _quality_tiles(run: Run) -> list[Tile]:
    if run.evaluation is None:
        return [
            (name, f"{values[-1]:.3f}", "held out, last epoch")
            for name, key in (("MCC at 0.5", "mcc@0.5"), ("ROC AUC", "auc"), ("Loss", "loss"))
            if len(values := _series(run.steps, f"val/{key}")[1])
        ]
    e = run.evaluation
    fitted = f"fitted on {e.threshold_fitted_on}" if e.threshold_fitted_on else "given"
    same = ", the same clips" if e.threshold_fitted_on_same_clips else ""
    return [
        ("MCC", f"{e.mcc:.3f}", interval(e, e.mcc_ci95)),
        ("ROC AUC", f"{e.auc:.3f}", interval(e, e.auc_ci95)),
        ("Average precision", f"{e.ap:.3f}", f"chance {e.positives / e.clips:.3f}"),
        ("Threshold", f"{e.threshold:.3f}", fitted + same),
    ]


def _cost_tiles(run: Run) -> list[Tile]:
    resumed = len(run.resumed_from)
    return [
        ("Throughput", _median(run.steps, "speed/clips_per_second", "{:,.1f}"), "clips/s, median"),
        (
            "Time training",
            _duration(_seconds(run)),
            f"resumed {_count(resumed, 'time')}" if resumed else "never resumed",
        ),
        ("Snapshots", str(run.snapshots), "averaged" if run.evaluation else "saved"),
    ]


def _facts(info: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """The parts of run.json that are mappings, as named tables."""
    return [
        (
            title,
            [(str(name).replace("_", " "), _plain(value)) for name, value in info[key].items()],
        )
        for title, key in (
            ("Versions", "versions"),
            ("Host", "host"),
            ("Positive rate", "positive_rate"),
        )
        if isinstance(info.get(key), dict)
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _series(steps: list[Record], name: str) -> tuple[metrics.Floats, metrics.Floats]:
    """Steps and values of a metric where it is defined."""
    pairs = [(record["step"], record[name]) for record in steps if record.get(name) is not None]
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(y)
    return x[finite], y[finite]


def _median(steps: list[Record], name: str, form: str) -> str:
    values = _series(steps, name)[1]
    return form.format(np.median(values)) if len(values) else "–"


def _seconds(run: Run) -> float:
    """Time between steps, less the pauses between sessions."""
    x, time = _series(run.steps, "time")
    gaps = np.diff(time)
    return float(gaps[~np.isin(x[:-1], run.resumed_from)].sum())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- figures ------------------------------------------------------------------------------------


def _axes(xlabel: str, ylabel: str, *, square: bool = False) -> Axes:
    figure = Figure(figsize=(5.6, 4.6) if square else (5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0)
    return axes


def _svg(axes: Axes) -> str:
    """The figure as a data URI that follows the reader's fonts and light or dark scheme."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=5, columnspacing=1.2, handlelength=1.6)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().replace("'DejaVu Sans'", _FONTS)
    for name, (light, _) in _COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    light, dark = (
        ";".join(f"--{name}:{pair[scheme]}" for name, pair in _COLOURS.items()) for scheme in (0, 1)
    )
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    svg = svg.replace("<defs>", style + "<defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _finish_steps(axes: Axes, run: Run) -> None:
    """Give the figures over steps one common range, and mark where the run was resumed."""
    axes.set_xlim(0, run.steps[-1]["step"] * 1.02)
    for index, step in enumerate(run.resumed_from):
        label = "resumed" if index == 0 else None
        axes.axvline(step, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1, label=label)


def _draw_steps(axes: Axes, run: Run, name: str, colour: str, label: str | None = None) -> None:
    """A value of each step: the mean and the range of runs of adjacent steps."""
    x, y = _series(run.steps, name)
    if not len(x):
        return
    groups = np.array_split(np.arange(len(x)), min(len(x), _CURVE_BINS))
    middle = [x[group].mean() for group in groups]
    low, high = [y[group].min() for group in groups], [y[group].max() for group in groups]
    axes.fill_between(middle, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(middle, [y[group].mean() for group in groups], color=colour, label=label)


def _draw_epochs(axes: Axes, run: Run, name: str, colour: str, label: str | None = None) -> None:
    """A value of each epoch, at the step that ended it; training dashed, held-out solid."""
    x, y = _series(run.steps, name)
    held_out = name.startswith("val/")
    form: Record = {"marker": "o", "markersize": 4} if held_out else {"linestyle": (0, (2, 1.5))}
    axes.plot(x, y, color=colour, label=label, **form)


def _learning_curves(run: Run) -> list[Plot]:
    loss = _axes("optimizer step", "loss")
    _draw_steps(loss, run, "train/loss", _BLUE, "training")
    _draw_epochs(loss, run, "val/loss", _ORANGE, "held out")
    mcc = _axes("optimizer step", "MCC")
    colours = zip(metrics.THRESHOLDS, (_BLUE, _ORANGE, _GREEN, _PURPLE), strict=True)
    for threshold, colour in colours:
        _draw_epochs(mcc, run, f"val/mcc@{threshold}", colour, f"at {threshold}")
        _draw_epochs(mcc, run, f"train/mcc@{threshold}", colour)
    accuracy = _axes("optimizer step", "accuracy")
    _draw_epochs(accuracy, run, "train/accuracy", _BLUE, "training")
    _draw_epochs(accuracy, run, "val/accuracy", _ORANGE, "held out")
    ranking = _axes("optimizer step", "area under the curve")
    for key, name, colour in (("auc", "ROC", _GREEN), ("ap", "precision-recall", _PURPLE)):
        _draw_epochs(ranking, run, f"val/{key}", colour, name)
        _draw_epochs(ranking, run, f"train/{key}", colour)
    gap = _axes("optimizer step", "difference of losses")
    gap.axhline(_LARGEST_GAP, color=_ORANGE, linestyle=(0, (4, 3)), linewidth=1, label="too much")
    x, y = _series(run.steps, "norm/gap")
    gap.plot(x, y, color=_BLUE, marker="o", markersize=4)
    for axes in (loss, mcc, accuracy, ranking, gap):
        _finish_steps(axes, run)
    return [
        Plot("Loss", "Training loss by step (band: range), held-out loss by epoch.", _svg(loss)),
        Plot("MCC", "At four fixed thresholds. Held out solid, training dashed.", _svg(mcc)),
        Plot("Accuracy", "At 0.5. With rare positives a weak guide; see MCC.", _svg(accuracy)),
        Plot("Ranking", "Threshold-free. Held out solid, training dashed.", _svg(ranking)),
        Plot(
            "Normalisation gap",
            "Loss of training clips by the statistics that held-out clips are judged by, less that "
            "by their own batch's. Near 0 is good.",
            _svg(gap),
        ),
    ]


def _large_gap(run: Run) -> str | None:
    """Where the gap of normalisation was too large to believe held-out figures."""
    steps, gaps = _series(run.steps, "norm/gap")
    large = steps[gaps > _LARGEST_GAP]
    if not len(large):
        return None
    worst = int(gaps.argmax())
    return (
        f"The normalisation gap was above {_LARGEST_GAP} at the end of {len(large)} of "
        f"{_count(len(gaps), 'epoch')} ({gaps[worst]:.2f} at step {steps[worst]:.0f}). Held-out "
        "figures of these epochs say more of BatchNorm's statistics than of the weights."
    )


def _judgement(run: Run) -> list[Plot]:
    if run.evaluation is None or run.predictions is None:
        return []
    e, clips = run.evaluation, run.predictions
    probability, label = clips["probability"].to_numpy(), clips["label"].to_numpy()
    return [
        Plot(
            "Precision and recall",
            "The dot is the threshold in use; the dashed line is chance.",
            _svg(_precision_recall(probability, label, e)),
        ),
        Plot(
            "Receiver operating characteristic",
            "The dot is the threshold in use; the dashed line is chance.",
            _svg(_roc(probability, label, e)),
        ),
        Plot(
            "MCC against the threshold",
            f"On the {e.split} clips. A wide top forgives a threshold that is a little off.",
            _svg(_mcc_by_threshold(clips["calibrated"].to_numpy(), label, e)),
        ),
        Plot(
            "Calibration",
            _calibration_caption(e),
            _svg(_calibration(probability, clips["calibrated"].to_numpy(), label)),
        ),
    ]


def _thinned(*columns: ArrayLike) -> Iterable[metrics.Floats]:
    """At most 500 points of a curve, the ends included."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    size = len(arrays[0])
    keep = np.unique(np.linspace(0, size - 1, min(size, 500)).round().astype(np.int64))
    return (array[keep] for array in arrays)


def _precision_recall(probability: metrics.Floats, label: metrics.Floats, e: Evaluation) -> Axes:
    axes = _axes("recall", "precision", square=True)
    recall, precision = _thinned(*metrics.precision_recall_curve(probability, label))
    # Average precision is the area under exactly these steps.
    axes.step(recall, precision, color=_BLUE, where="pre")
    axes.axhline(e.positives / e.clips, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
    if e.precision is not None:
        axes.plot(e.recall, e.precision, "o", color=_ORANGE, markersize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    return axes


def _roc(probability: metrics.Floats, label: metrics.Floats, e: Evaluation) -> Axes:
    axes = _axes("false positive rate", "true positive rate", square=True)
    false_rate, true_rate = _thinned(*metrics.roc_curve(probability, label))
    axes.plot(false_rate, true_rate, color=_BLUE)
    axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
    (tn, fp), _ = e.confusion
    axes.plot(fp / (fp + tn), e.recall, "o", color=_ORANGE, markersize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    return axes


def _mcc_by_threshold(probability: metrics.Floats, label: metrics.Floats, e: Evaluation) -> Axes:
    axes = _axes("threshold of the calibrated probability", "MCC", square=True)
    thresholds, values = _thinned(*metrics.mcc_curve(probability, label))
    # Below the lowest score every clip is called positive, which is an MCC of 0.
    axes.step([0, *thresholds, 1], [0, *values, values[-1]], color=_BLUE, where="post")
    axes.axvline(e.threshold, color=_ORANGE, linewidth=1.4, label=f"in use: {e.threshold:.3f}")
    axes.plot(e.threshold, e.mcc, "o", color=_ORANGE, markersize=9)
    axes.set(xlim=(-0.02, 1.02))
    return axes


def _calibration_caption(e: Evaluation) -> str:
    caption = "Ten bins of equal numbers of clips. On the diagonal, a probability is a frequency."
    if e.calibration is None:
        return caption
    here = e.positives / e.clips
    return f"{caption} Calibrated: {how_calibrated(e.calibration)}; these clips have {here:.1%}."


def _calibration(raw: metrics.Floats, corrected: metrics.Floats, label: metrics.Floats) -> Axes:
    axes = _axes("predicted probability", "share of positives", square=True)
    axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
    for name, probability, colour, marker in (
        ("raw", raw, _BLUE, "o"),
        ("calibrated", corrected, _ORANGE, "s"),
    ):
        predicted, observed, _ = metrics.reliability(probability, label)
        axes.plot(predicted, observed, color=colour, marker=marker, markersize=6, label=name)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    return axes


def _speed(run: Run) -> list[Plot]:
    rate = _axes("optimizer step", "clips per second")
    _draw_steps(rate, run, "speed/clips_per_second", _BLUE)
    wait = _axes("optimizer step", "share of the step")
    _draw_steps(wait, run, "speed/data_wait", _ORANGE)
    memory = _axes("optimizer step", "memory (MiB)")
    _draw_steps(memory, run, "memory/host_mb", _BLUE, "host")
    _draw_steps(memory, run, "memory/device_mb", _ORANGE, "device")
    norm = _axes("optimizer step", "gradient norm")
    _draw_steps(norm, run, "train/grad_norm", _PURPLE)
    for axes in (rate, wait, memory, norm):
        axes.set_ylim(bottom=0)
        _finish_steps(axes, run)
    memory.yaxis.set_major_formatter("{x:,.0f}")
    wait.yaxis.set_major_formatter("{x:.1%}")
    median_rate = _median(run.steps, "speed/clips_per_second", "{:,.1f}")
    median_wait = _median(run.steps, "speed/data_wait", "{:.1%}")
    return [
        Plot("Throughput", f"Median {median_rate} clips per second. Band: range.", _svg(rate)),
        Plot("Waiting for data", f"Median {median_wait} of a step's wall time.", _svg(wait)),
        Plot("Memory", "At each step. Memory that never stops growing is a leak.", _svg(memory)),
        Plot("Gradient norm", "By step. Band: range.", _svg(norm)),
    ]


# ---- the worst mistakes -------------------------------------------------------------------------


def _mistakes(run: Run, strips: Strips) -> list[tuple[str, list[Mistake]]]:
    """The most confident false positives and false negatives, as named lists."""
    if run.evaluation is None or run.predictions is None:
        return []
    clips, called = run.predictions, run.predictions["calibrated"] > run.evaluation.threshold
    false_positives = clips[called & (clips["label"] == 0)]
    false_negatives = clips[~called & (clips["label"] == 1)]
    return [
        (title, [_mistake(clip, strips) for clip in worst.to_dict("records")])
        for title, worst in (
            ("False positives", false_positives.nlargest(_MISTAKES, "probability")),
            ("False negatives", false_negatives.nsmallest(_MISTAKES, "probability")),
        )
    ]


def _mistake(clip: dict[Any, Any], strips: Strips) -> Mistake:
    frames = strips(clip["key"])
    chosen = np.unique(np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(np.int64))
    return Mistake(
        filename=clip["filename"],
        label=int(clip["label"]),
        probability=clip["probability"],
        frames=f"{len(chosen)} of {len(frames)} frames",
        image=_strip(frames[chosen]),
    )


def _strip(frames: NDArray[np.uint8]) -> str:
    """Frames side by side, as the data URI of a PNG; large ones are shrunk."""
    height, width = frames.shape[1:]
    scale = min(1.0, _STRIP_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    tiles = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    gap = np.full((size[1], 2), 255, dtype=np.uint8)
    row = np.hstack([part for tile in tiles for part in (gap, tile)][1:])
    png = cv2.imencode(".png", row)[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(png).decode()
