"""An evaluation of more than two classes, labels or values, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from dist_train.evaluation import evaluation_text
from dist_train.evaluation.class_calibration import ClassCalibration, LabelCalibration
from dist_train.evaluation.evaluate import Evaluation
from dist_train.evaluation.target_evaluation import Figure, TargetEvaluation

TITLES = {
    "mcc": "MCC",
    "qwk": "Quadratic kappa",
    "kappa": "Cohen's kappa",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "Area under ROC",
    "ap": "Average precision",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R2",
}
#: Most classes whose confusion a terminal shows, and most rows of a table of classes.
MOST_COLUMNS, MOST_ROWS = 8, 100
#: Metrics of slices that are shown; the file has all.
OF_SLICES = 4


def tables(evaluation: Evaluation | TargetEvaluation) -> list[Table]:
    """All of an evaluation for the terminal."""
    if isinstance(evaluation, Evaluation):
        slices = [] if evaluation.by is None else [evaluation_text.slices(evaluation)]
        return [evaluation_text.table(evaluation), *slices]
    e = evaluation
    found = [_table(f"{e.split}: {e.clips} clips, {e.kind}", ["metric", "value"], rows(e))]
    found.append(_table("", class_header(e), class_rows(e)))
    if e.confusion is not None and len(e.classes) <= MOST_COLUMNS:
        cells = [[name, *map(str, row)] for name, row in zip(e.classes, e.confusion, strict=True)]
        found.append(_table("confusion", ["is", *(f"called {c}" for c in e.classes)], cells))
    if e.by is not None:
        found.append(_table(f"by {e.by}", slice_header(e), slice_rows(e)))
    return found


def _table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    view = Table(title=title or None, title_justify="left")
    for number, name in enumerate(header):
        view.add_column(name, justify="right" if number > 1 else "left")
    for row in cells:
        view.add_row(*row)
    return view


def rows(e: TargetEvaluation) -> list[tuple[str, str]]:
    """Metrics as (name, formatted value), the most important first."""
    found = [(title(e, name), told(figure)) for name, figure in e.metrics.items()]
    if e.threshold_fitted_on is not None or e.threshold is not None:
        same = ", the same clips" if e.threshold_fitted_on_same_clips else ""
        origin = f"fitted on {e.threshold_fitted_on}{same}"
        found.append(("Thresholds", origin if e.threshold is None else f"{e.threshold:.4f}, given"))
    if e.calibration is not None:
        found.append(("Calibration", how_calibrated(e.calibration)))
    if e.raw is not None and e.calibrated is not None:
        names = {"ece": "Calibration error", "brier": "Brier score", "log_loss": "Log loss"}
        for name, of in names.items():
            raw, calibrated = (getattr(each, name) for each in (e.raw, e.calibrated))
            found.append((f"{of} on {e.split}", f"{raw:.3f} raw, {calibrated:.3f} calibrated"))
    return found


def title(e: TargetEvaluation, name: str) -> str:
    """A metric's name for people."""
    if e.kind == "regression":
        several = ", mean over values" if len(e.classes) > 1 else ""
        return TITLES[name] + several
    of = {"multilabel": ", mean over labels"}.get(e.kind, ", mean over classes")
    if name == "mae":
        return "Mean distance in classes"
    is_mean = name in ("auc", "ap") or (name == "mcc" and e.kind == "multilabel")
    return TITLES[name] + (of if is_mean else "")


def told(figure: Figure) -> str:
    """A metric with its interval."""
    if figure.value is None:
        return "–"
    if figure.ci95 is None:
        return number(figure.value)
    return f"{number(figure.value)}  ({interval(figure)})"


def interval(figure: Figure) -> str:
    """A bootstrap interval in words."""
    if figure.ci95 is None:
        return "no interval"
    low, high = figure.ci95
    if low == high:
        return "no interval: no resample differs"
    return f"95 % CI {number(low)} to {number(high)}"


def number(value: float | None) -> str:
    """Three decimals, or four digits of a large number."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def class_header(e: TargetEvaluation) -> list[str]:
    """Titles of the columns of ``class_rows``."""
    if e.kind == "regression":
        return ["value", *(TITLES[name] for name in e.metrics), "bias"]
    threshold = ["threshold"] if e.kind == "multilabel" else []
    kind = "label" if e.kind == "multilabel" else "class"
    return [kind, "clips", "called", "sensitivity", "precision", "AUC", "AP", *threshold]


def class_rows(e: TargetEvaluation) -> list[list[str]]:
    """A row for each class, label or value; of very many, those with the most clips."""
    if e.kind == "regression":
        return [
            [v.name, *(told(figure) for figure in v.metrics.values()), number(v.bias)]
            for v in e.per_value
        ]
    shown = e.per_class
    if len(shown) > MOST_ROWS:
        shown = tuple(sorted(shown, key=lambda c: -c.clips)[:MOST_ROWS])
    return [
        [
            c.name,
            f"{c.clips:,}",
            f"{c.called:,}",
            *map(number, (c.sensitivity, c.precision, c.auc, c.ap)),
            *([] if c.threshold is None else [f"{c.threshold:.3f}"]),
        ]
        for c in shown
    ]


def slice_header(e: TargetEvaluation) -> list[str]:
    """Titles of the columns of ``slice_rows``."""
    main, *others = list(e.metrics)[:OF_SLICES]
    return [e.by or "", "clips", TITLES[main], "95 % CI", *(TITLES[name] for name in others)]


def slice_rows(e: TargetEvaluation) -> list[list[str]]:
    """A row of formatted metrics for each value of the column ``by``."""
    found = []
    for s in e.slices:
        main, *others = list(s.metrics.values())[:OF_SLICES]
        bounds = "–" if main.ci95 is None else " to ".join(map(number, main.ci95))
        values = [number(other.value) for other in others]
        found.append([s.value or "(missing)", f"{s.clips:,}", number(main.value), bounds, *values])
    return found


def how_calibrated(calibration: ClassCalibration | LabelCalibration) -> str:
    """The steps of the calibration, in order."""
    if isinstance(calibration, LabelCalibration):
        methods = [c.method for c in calibration.labels.values()]
        count = {method: methods.count(method) for method in dict.fromkeys(methods)}
        return "each label by itself: " + ", ".join(f"{m} of {n}" for m, n in count.items())
    c = calibration
    mapping = "no mapping" if c.method == "none" else f"temperature {1 / c.slope:.3g}"
    if c.bias:
        mapping += " and a bias for each class"
    reason = "because the classes have too few clips among"
    if c.cross_validated:
        reason = f"of {', '.join(c.cross_validated)}, by cross-validated log loss on"
    return f"{mapping} ({reason} {sum(c.counts)} val clips), then to the shares of the prior"
