"""An evaluation in words and numbers, for the terminal and the report."""

from __future__ import annotations

from rich.table import Table

from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.evaluate import Evaluation
from dist_train.evaluation.slices import Interval

#: With fewer clips of the rarer class, an interval says how many there are.
FEW_CLIPS = 30


def table(evaluation: Evaluation) -> Table:
    """All metrics as a table for the terminal."""
    e = evaluation
    (tn, fp), (fn, tp) = e.confusion
    title = f"{e.split}: {e.clips} clips, {e.positives} {e.classes[1]}"
    view = Table(title=title, title_justify="left")
    view.add_column("metric")
    view.add_column("value")
    for name, value in rows(evaluation):
        view.add_row(name, value)
    view.add_row("Confusion", f"{tp} TP  {fn} FN  {fp} FP  {tn} TN")
    return view


def slices(evaluation: Evaluation) -> Table:
    """The metrics of each value of the column ``by``, for the terminal."""
    view = Table(title=f"by {evaluation.by}", title_justify="left")
    for number, name in enumerate(slice_header(evaluation)):
        # A terminal of 80 columns has room for "(missing)".
        view.add_column(name, justify="right" if number else "left", min_width=0 if number else 9)
    for cells in slice_rows(evaluation):
        view.add_row(*cells)
    return view


def slice_header(evaluation: Evaluation) -> list[str]:
    """Titles of the columns of ``slice_rows``."""
    negative, positive = evaluation.classes
    of_each = [f"called {positive}", "MCC", "95 % CI", "AP"]
    return [evaluation.by or "", "clips", positive, negative, *of_each]


def slice_rows(evaluation: Evaluation) -> list[list[str]]:
    """A row of formatted metrics for each value; "–" stands for what one class does not define."""
    return [
        [
            s.value or "(missing)",
            f"{s.clips:,}",
            f"{s.positives:,}",
            f"{s.clips - s.positives:,}",
            f"{s.confusion[0][1] + s.confusion[1][1]:,}",
            "–" if s.mcc is None else f"{s.mcc:.3f}",
            "–" if s.mcc_ci95 is None else "{:.3f} to {:.3f}".format(*s.mcc_ci95),
            "–" if s.ap is None else f"{s.ap:.3f}",
        ]
        for s in evaluation.slices
    ]


def rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Metrics as (name, formatted value), the most important first."""
    e = evaluation
    return [
        ("MCC", f"{e.mcc:.3f}  ({interval(e, e.mcc_ci95)})"),
        ("Area under ROC", f"{e.auc:.3f}  ({interval(e, e.auc_ci95)})"),
        ("Average precision", f"{e.ap:.3f}  (chance {e.positives / e.clips:.3f})"),
        ("Threshold", f"{e.threshold:.4f}  ({threshold_origin(e)})"),
        *((f"MCC at {threshold}", f"{value:.3f}") for threshold, value in e.mcc_at.items()),
        (
            "Precision",
            f"none called {e.classes[1]}" if e.precision is None else f"{e.precision:.3f}",
        ),
        ("Recall", f"{e.recall:.3f}"),
        ("F1", f"{e.f1:.3f}"),
        ("Accuracy", f"{e.accuracy:.3f}"),
        *([] if e.tta is None else [("Mean over views", f"--tta {e.tta}")]),
        *_reliability_rows(e),
    ]


def interval(evaluation: Evaluation, bounds: Interval) -> str:
    """A bootstrap interval in words.

    If every draw gives the same value, as when no clip is wrong, the bootstrap knows no
    uncertainty, and the text is the number of clips alone.
    """
    low, high = bounds
    rarer = min(evaluation.positives, evaluation.clips - evaluation.positives)
    kind = evaluation.classes[rarer == evaluation.positives]
    if low == high:
        few = "only " if rarer < FEW_CLIPS else ""
        return f"no interval: no resample of the {few}{rarer} {kind} clips differs"
    few = f", of only {rarer} {kind} clips" if rarer < FEW_CLIPS else ""
    return f"95 % CI {low:.3f} to {high:.3f}{few}"


def threshold_origin(evaluation: Evaluation) -> str:
    """Where the threshold comes from."""
    if evaluation.threshold_fitted_on is None:
        return "given"
    same = ", the same clips" if evaluation.threshold_fitted_on_same_clips else ""
    return f"fitted on {evaluation.threshold_fitted_on}{same}"


def how_calibrated(calibration: Calibration) -> str:
    """The steps of the calibration, in order."""
    c = calibration
    mapping = {
        "none": "no mapping",
        "temperature": f"temperature {1 / c.slope:.3g}",
        "temperature and bias": f"temperature {1 / c.slope:.3g} and bias {c.bias:.3g}",
        "isotonic": "isotonic regression",
    }[c.method]
    reason = "because the rarer class has too few clips among"
    if c.cross_validated:
        reason = f"of {', '.join(c.cross_validated)}, by cross-validated log loss on"
    return (
        f"{mapping} ({reason} {c.clips} val clips, {c.positives} positive), then from "
        f"{c.val_share:.1%} positives to {c.prior:.1%}"
    )


def _reliability_rows(e: Evaluation) -> list[tuple[str, str]]:
    """Raw and calibrated reliability, on the evaluated clips and by cross-validation on val."""
    pairs = [(f"on {e.split}", e.raw, e.calibrated)]
    found = []
    if (c := e.calibration) is not None:
        found.append(("Calibration", how_calibrated(c)))
        if c.raw is not None and c.method in c.cross_validated:
            pairs.append(("on val, cross-validated", c.raw, c.cross_validated[c.method]))
    names = {"ece": "Calibration error", "brier": "Brier score", "log_loss": "Log loss"}
    for name, title in names.items():
        for clips, raw, calibrated in pairs:
            value = f"{getattr(raw, name):.3f} raw, {getattr(calibrated, name):.3f} calibrated"
            found.append((f"{title} {clips}", value))
    return found
