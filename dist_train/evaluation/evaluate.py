"""Judge a table of predictions: fit the threshold on held-out clips, report on clips kept apart."""

import io
import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from dist_train import metrics
from dist_train.errors import ConfigError, FileError, RunError
from dist_train.evaluation.calibration import Calibration, Reliability, fit, reliability_of
from dist_train.evaluation.prediction_origin import AGAIN, check_origin, check_table
from dist_train.files import MIB, read_plain, write_whole
from dist_train.run.folder import CONFIG, EVALUATION, PREDICTIONS
from dist_train.run.record import open_run

COLUMNS = (
    "key",
    "filename",
    "group",
    "split",
    "label",
    "probability",
    "calibrated",
    "frames",
)

#: Some ten million clips.
MOST_BYTES = 2**31
CALIBRATION = "calibration.json"
#: Of the rarer class: with fewer, an interval says how many there are.
FEW_CLIPS = 30

_EXPECTED = {
    "split": "val or test",
    "label": "0, 1 or empty",
    "probability": "a number between 0 and 1",
    "calibrated": "a number between 0 and 1",
    "frames": "a whole number",
}

Split = Literal["val", "test"]
Interval = tuple[float, float]


class Evaluation(BaseModel):
    """The figures of one model on one split.

    The threshold, and what is counted at it, are on the ``calibrated`` column. ``mcc_at``, AUC and
    AP are on ``probability``, in the world of the training batches, as in the log. Intervals are
    95 % bootstrap intervals over clips, within each class, at a fixed threshold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Split
    clips: int
    positives: int
    threshold: float
    threshold_fitted_on: Split | None
    """None where the threshold was given."""
    threshold_fitted_on_same_clips: bool
    """True where the figures at the threshold are optimistic."""
    mcc: float
    mcc_ci95: Interval
    mcc_at: dict[str, float]
    """At fixed thresholds of ``probability``."""
    accuracy: float
    auc: float
    auc_ci95: Interval
    ap: float
    f1: float
    precision: float | None
    """None where no clip is called positive."""
    recall: float
    confusion: tuple[tuple[int, int], tuple[int, int]]
    """((tn, fp), (fn, tp))"""
    raw: Reliability
    """Of ``probability`` on these clips."""
    calibrated: Reliability
    calibration: Calibration | None
    """How ``calibrated`` was made, with figures of val by cross-validation; None if not known."""


def evaluate_run(run: Path, *, threshold: float | None = None) -> Evaluation:
    """Evaluate the predictions of a run as ``evaluate`` does, and write ``evaluation.json``.

    Raises:
        RunError: as ``evaluate``; or settings or weights are not those that were trained with.
        ConfigError: the threshold is not in 0..1.
    """
    if os.path.lexists(run / CONFIG) and os.path.lexists(run / PREDICTIONS):
        open_run(run)
        check_origin(run)
    return evaluate(run / PREDICTIONS, out=run / EVALUATION, threshold=threshold)


def evaluate(
    predictions: Path, *, out: Path | None = None, threshold: float | None = None
) -> Evaluation:
    """Evaluate a predictions table.

    The threshold of the highest MCC is fitted on the labelled ``val`` clips and the figures are
    those of the labelled ``test`` clips. Where only one of the two splits has labels, it serves for
    both, and ``threshold_fitted_on_same_clips`` is true.

    Args:
        predictions: a CSV file with the columns ``COLUMNS``; an empty label is unknown.
        out: where to write the evaluation as JSON; None writes nothing.
        threshold: use this one, and fit none.

    Raises:
        RunError: the file is missing or unusable, has no labelled clip, or its labels are of one
            class only.
        ConfigError: the threshold is not in 0..1.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(
            f"{threshold:g} is not a probability", where="threshold", fix="Give one in 0..1"
        )
    frame = read_predictions(predictions)
    labelled = {str(split): clips for split, clips in frame.dropna(subset="label").groupby("split")}
    if not labelled:
        raise RunError(
            "no clip has a label",
            where=predictions,
            fix="Predict clips whose labels are in the manifest",
        )
    reported: Split = "test" if "test" in labelled else "val"
    fitted_on: Split | None = None
    if threshold is None:
        fitted_on = "val" if "val" in labelled else "test"
        fitting = _both_classes(labelled[fitted_on], fitted_on, predictions)
        threshold = metrics.best_threshold(fitting["calibrated"], fitting["label"])
    evaluation = _figures(
        _both_classes(labelled[reported], reported, predictions),
        reported,
        threshold,
        fitted_on,
        calibration_of(frame, predictions.parent / CALIBRATION),
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, evaluation.model_dump_json(indent=2) + "\n")
    return evaluation


def read_predictions(path: Path) -> pd.DataFrame:
    """Read and check a predictions table.

    Returns:
        One row a clip; ``label`` is float64 in {0, 1}, NaN where unknown; ``probability`` and
        ``calibrated`` are float64 in 0..1; ``frames`` is int64; all else is text.

    Raises:
        RunError: the file is missing or is no CSV table, is not as it was predicted, lacks a
            column, has two rows of one clip, or holds a value that is not what its column holds.
    """
    if not os.path.lexists(path):
        raise RunError(
            "there are no predictions", where=path, fix="Make them with `dist-train predict`"
        )
    try:
        content = read_plain(path, most_bytes=MOST_BYTES)
    except FileError as error:
        raise RunError(error.what, where=path, fix=AGAIN) from None
    check_table(path, content)
    try:
        frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    except ValueError as error:  # covers pandas' parser errors and undecodable bytes
        raise RunError(
            f"this is not a CSV table: {str(error).strip()}",
            where=path,
            fix="Make it again with `dist-train predict`",
        ) from error
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise RunError(
            f"the table has no column {', '.join(missing)}",
            where=path,
            fix="Make it again with `dist-train predict`",
        )
    if len(frame) and (frame["split"] == "").all():
        raise RunError(
            "these are predictions of another store, whose clips have no split",
            where=path,
            fix="Evaluate the run's own",
        )
    twice = frame["key"].duplicated()
    if twice.any():
        raise RunError(
            f"{int(twice.sum())} rows are of a clip that has a row already",
            where=f"{path}, clip {frame['key'][twice].iloc[0]}",
            fix=AGAIN,
        )
    unlabelled = frame["label"] == ""
    _refuse(frame, "label", ~frame["label"].isin(["0", "1", "0.0", "1.0"]) & ~unlabelled, path)
    _refuse(frame, "split", ~frame["split"].isin(["val", "test"]), path)
    _refuse(frame, "frames", ~frame["frames"].str.fullmatch("[0-9]{1,9}"), path)
    for column in ("probability", "calibrated"):
        numbers = pd.to_numeric(frame[column], errors="coerce")
        _refuse(frame, column, ~numbers.between(0, 1), path)
        frame[column] = numbers
    frame["label"] = frame["label"].mask(unlabelled, "nan").astype(np.float64)
    frame["frames"] = frame["frames"].astype(np.int64)
    return frame


def calibration_of(frame: pd.DataFrame, path: Path) -> Calibration | None:
    """What ``predict`` wrote to ``path`` of a table of predictions; None where it wrote none.

    It is fitted again on the table's own val clips, by the shares of positives that it says.

    Raises:
        RunError: the file is damaged, or is not of these predictions.
    """
    calibration = _read_calibration(path)
    if calibration is None:
        return None
    own = fit(
        *val_clips(frame), batches_share=calibration.batches_share, prior=calibration.prior
    ).model_copy(update={"snapshots": calibration.snapshots})
    # The minimum is found to some five digits, which differ from machine to machine.
    if not is_same(own.model_dump(), calibration.model_dump(), within=1e-3) or not np.allclose(
        calibration.apply(frame["probability"]), frame["calibrated"], rtol=1e-6, atol=1e-9
    ):
        raise RunError(
            "this is the calibration of other predictions than those beside it",
            where=path,
            fix="Make both again with `dist-train predict`",
        )
    return calibration


def is_same(a: object, b: object, *, within: float = 1e-6) -> bool:
    """Whether two trees of figures are equal, but for a relative difference of numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[n], b[n], within=within) for n in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(
            is_same(one, other, within=within) for one, other in zip(a, b, strict=True)
        )
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=within, abs_tol=within * 1e-3)
    return a == b


def val_clips(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels, float64 [N] each, of the labelled val clips of a table."""
    val = frame[(frame["split"] == "val") & frame["label"].notna()]
    return val["probability"].to_numpy(), val["label"].to_numpy()


def val_threshold(
    calibration: Calibration, probability: metrics.Floats, label: metrics.Floats
) -> float:
    """Of the best MCC on val clips, as ``evaluate`` fits it; 0.5 where they lack a class."""
    if len(np.unique(label)) < 2:
        return 0.5
    return metrics.best_threshold(calibration.apply(probability), label)


def _read_calibration(path: Path) -> Calibration | None:
    if not os.path.lexists(path):
        return None
    try:
        return Calibration.model_validate_json(read_plain(path, most_bytes=MIB))
    except (FileError, ValidationError) as error:
        raise RunError(
            "this is not a calibration", where=path, fix="Make it again with `dist-train predict`"
        ) from error


def rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The figures as (name, formatted value), in the order in which to read them."""
    e = evaluation
    return [
        ("MCC", f"{e.mcc:.3f}  ({interval(e, e.mcc_ci95)})"),
        ("Area under ROC", f"{e.auc:.3f}  ({interval(e, e.auc_ci95)})"),
        ("Average precision", f"{e.ap:.3f}  (chance {e.positives / e.clips:.3f})"),
        ("Threshold", f"{e.threshold:.4f}  ({_origin(e)})"),
        *((f"MCC at {threshold}", f"{value:.3f}") for threshold, value in e.mcc_at.items()),
        ("Precision", "none called positive" if e.precision is None else f"{e.precision:.3f}"),
        ("Recall", f"{e.recall:.3f}"),
        ("F1", f"{e.f1:.3f}"),
        ("Accuracy", f"{e.accuracy:.3f}"),
        *_reliability_rows(e),
    ]


def interval(evaluation: Evaluation, bounds: tuple[float, float]) -> str:
    """A bootstrap interval in words. Where every draw gives the same value, as where no clip is
    wrong, the bootstrap knows no uncertainty, and the number of clips is all that can be said."""
    low, high = bounds
    rarer = min(evaluation.positives, evaluation.clips - evaluation.positives)
    kind = "positive" if rarer == evaluation.positives else "negative"
    if low == high:
        return f"no interval: only {rarer} {kind} clips"
    few = f", of only {rarer} {kind} clips" if rarer < FEW_CLIPS else ""
    return f"95 % CI {low:.3f} to {high:.3f}{few}"


def table(evaluation: Evaluation) -> Table:
    """The figures as a table for the terminal."""
    e = evaluation
    (tn, fp), (fn, tp) = e.confusion
    view = Table(title=f"{e.split}: {e.clips} clips, {e.positives} positive", title_justify="left")
    view.add_column("figure")
    view.add_column("value")
    for name, value in rows(evaluation):
        view.add_row(name, value)
    view.add_row("Confusion", f"{tp} TP  {fn} FN  {fp} FP  {tn} TN")
    return view


def _figures(
    clips: pd.DataFrame,
    split: Split,
    threshold: float,
    fitted_on: Split | None,
    calibration: Calibration | None,
) -> Evaluation:
    probability, label = clips["probability"].to_numpy(), clips["label"].to_numpy()
    figures = metrics.binary_metrics(probability, label)
    calibrated = clips["calibrated"].to_numpy()
    counts = metrics.confusion(calibrated, label, threshold)
    mcc_draws, _ = metrics.stratified_bootstrap(calibrated, label, threshold)
    _, auc_draws = metrics.stratified_bootstrap(probability, label, threshold)
    called = counts.tp + counts.fp
    return Evaluation(
        split=split,
        clips=len(clips),
        positives=int(label.sum()),
        threshold=threshold,
        threshold_fitted_on=fitted_on,
        threshold_fitted_on_same_clips=fitted_on == split,
        mcc=metrics.mcc(counts),
        mcc_ci95=_interval(mcc_draws),
        mcc_at={str(t): _defined(figures[f"mcc@{t}"]) for t in metrics.THRESHOLDS},
        accuracy=(counts.tp + counts.tn) / len(clips),
        auc=_defined(figures["auc"]),
        auc_ci95=_interval(auc_draws),
        ap=_defined(figures["ap"]),
        f1=2 * counts.tp / (2 * counts.tp + counts.fp + counts.fn),
        precision=counts.tp / called if called else None,
        recall=counts.tp / (counts.tp + counts.fn),
        confusion=((counts.tn, counts.fp), (counts.fn, counts.tp)),
        raw=reliability_of(probability, label),
        calibrated=reliability_of(calibrated, label),
        calibration=calibration,
    )


def _reliability_rows(e: Evaluation) -> list[tuple[str, str]]:
    """Raw and calibrated, on the evaluated clips, and on val by cross-validation."""
    figures = [(f"on {e.split}", e.raw, e.calibrated)]
    c = e.calibration
    lines = []
    if c is not None:
        lines.append(("Calibration", how_calibrated(c)))
        if c.raw is not None and c.method in c.cross_validated:
            figures.append(("on val, cross-validated", c.raw, c.cross_validated[c.method]))
    for name, form in (("ece", "Calibration error"), ("brier", "Brier score"),
                       ("log_loss", "Log loss")):  # fmt: skip
        for where, raw, calibrated in figures:
            value = f"{getattr(raw, name):.3f} raw, {getattr(calibrated, name):.3f} calibrated"
            lines.append((f"{form} {where}", value))
    return lines


def how_calibrated(c: Calibration) -> str:
    """The steps of the mapping, in their order."""
    fitted = {
        "none": "no mapping",
        "temperature": f"temperature {1 / c.slope:.3g}",
        "temperature and bias": f"temperature {1 / c.slope:.3g} and bias {c.bias:.3g}",
        "isotonic": "isotonic regression",
    }[c.method]
    of = f"of {', '.join(c.cross_validated)}, by cross-validated log loss on" if (
        c.cross_validated
    ) else "as too few are of the rarer class among"  # fmt: skip
    return (
        f"{fitted} ({of} {c.clips} val clips, {c.positives} positive), then from "
        f"{c.val_share:.1%} positives to {c.prior:.1%}"
    )


def _defined(value: float | None) -> float:
    assert value is not None, "both classes are present"
    return value


def _interval(draws: metrics.Floats) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _origin(evaluation: Evaluation) -> str:
    if evaluation.threshold_fitted_on is None:
        return "given"
    same = ", the same clips" if evaluation.threshold_fitted_on_same_clips else ""
    return f"fitted on {evaluation.threshold_fitted_on}{same}"


def _both_classes(clips: pd.DataFrame, split: str, path: Path) -> pd.DataFrame:
    positives = int(clips["label"].sum())
    if not 0 < positives < len(clips):
        raise RunError(
            f"the {len(clips)} labelled {split} clips are all "
            f"{'positive' if positives else 'negative'}",
            where=path,
            fix="Predict clips of both classes",
        )
    return clips


def _refuse(frame: pd.DataFrame, column: str, wrong: "pd.Series[bool]", path: Path) -> None:
    """Raise on the first wrong value of a column."""
    if not wrong.any():
        return
    row = int(wrong.to_numpy().argmax())
    raise RunError(
        f"{column} is '{frame[column].iloc[row]}', not {_EXPECTED[column]}",
        where=f"{path}, clip {frame['key'].iloc[row]}",
        fix="Make the table again with `dist-train predict`",
    )
