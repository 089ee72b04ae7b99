"""Evaluate predictions: fit the threshold on val clips, and compute the metrics of test clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from dist_train import metrics
from dist_train.data.types import CLASSES
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation.calibration import Calibration, Reliability, reliability_of
from dist_train.evaluation.prediction_origin import check_origin, read_origin
from dist_train.evaluation.prediction_table import read_calibration, read_predictions
from dist_train.evaluation.slices import Interval, Slice, column_of, interval_of, slices_by
from dist_train.evaluation.target_evaluation import (
    Split,
    TargetEvaluation,
    evaluate_target,
    slices_of,
)
from dist_train.evaluation.target_table import Scored, is_labelled, scored, target_of_table
from dist_train.files import write_whole
from dist_train.run.folder import CONFIG, EVALUATION, PREDICTIONS
from dist_train.run.record import open_run
from dist_train.targets import Target


class Evaluation(BaseModel):
    """Metrics of one model on one split.

    The threshold, and the metrics at it, are of the ``calibrated`` column. ``mcc_at``, AUC and AP
    are of ``probability``, at the training batches' share of positives, as in the log. Intervals
    are 95 % bootstrap intervals over clips, within each class, at a fixed threshold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Split
    clips: int
    positives: int
    threshold: float
    threshold_fitted_on: Split | None
    """None if the threshold was given."""
    threshold_fitted_on_same_clips: bool
    """True if the metrics at the threshold are optimistic."""
    mcc: float
    mcc_ci95: Interval
    mcc_at: dict[str, float]
    """By fixed threshold of ``probability``."""
    accuracy: float
    auc: float
    auc_ci95: Interval
    ap: float
    f1: float
    precision: float | None
    """None if no clip is called positive."""
    recall: float
    confusion: tuple[tuple[int, int], tuple[int, int]]
    """((tn, fp), (fn, tp))"""
    raw: Reliability
    """Of ``probability`` on these clips."""
    calibrated: Reliability
    calibration: Calibration | None
    """How ``calibrated`` was computed, with cross-validated metrics on val; None if unknown."""
    classes: tuple[str, str] = (CLASSES[0], CLASSES[1])
    """Names of the labels 0 and 1."""
    tta: str | None = None
    """Test-time augmentation of the predictions; None for none, or unknown."""
    by: str | None = None
    """The column of ``slices``."""
    slices: tuple[Slice, ...] = ()
    """The values with the most clips, see ``slices_by``."""


def evaluate_run(
    run: Path, *, threshold: float | None = None, by: str | None = None
) -> Evaluation | TargetEvaluation:
    """Evaluate the predictions of a run as ``evaluate_any`` does, and write ``evaluation.json``.

    Raises:
        RunError: as ``evaluate``; or the settings or weights are not those of the training.
        ConfigError: the threshold is not in 0..1, or does not fit the kind of target.
    """
    if os.path.lexists(run / CONFIG) and os.path.lexists(run / PREDICTIONS):
        open_run(run)
        check_origin(run)
    return evaluate_any(run / PREDICTIONS, out=run / EVALUATION, threshold=threshold, by=by)


def evaluate_any(
    predictions: Path,
    *,
    out: Path | None = None,
    threshold: float | None = None,
    by: str | None = None,
) -> Evaluation | TargetEvaluation:
    """Evaluate a table of predictions of any kind of target.

    Of two classes and of labels, a threshold of the highest MCC is fitted on the labelled ``val``
    clips. The metrics are of the labelled ``test`` clips. If only one of the two splits has labels,
    it serves for both, and ``threshold_fitted_on_same_clips`` is true.

    Args:
        predictions: a CSV file as ``predict`` writes it; an empty label is unknown.
        out: JSON file to write the evaluation to; None writes nothing.
        threshold: use this one instead of fitting one; of several labels, for all.
        by: a column of metadata, or "group": metrics of the clips of each of its values, too.

    Raises:
        RunError: the file is missing or unusable, or has no labelled clip, or only labels of one
            class, or not the column ``by``.
        ConfigError: the threshold is not in 0..1, or does not fit the kind of target.
    """
    check_threshold(threshold)
    frame = read_predictions(predictions)
    target = target_of_table(frame)
    check_has_threshold(target, threshold)
    column = None if by is None else column_of(frame, by, predictions)
    known = frame[is_labelled(frame, target)]
    labelled = {str(split): clips for split, clips in known.groupby("split")}
    if not labelled:
        raise RunError(
            "no clip has a label",
            where=predictions,
            fix="Predict clips whose labels are in the manifest",
        )
    reported: Split = "test" if "test" in labelled else "val"
    fitted_on: Split | None = None
    if threshold is None and target.kind in ("binary", "multilabel"):
        fitted_on = "val" if "val" in labelled else "test"
    # Where no threshold is fitted, it is not used.
    fitting = labelled[fitted_on or reported]
    clips, calibration = labelled[reported], read_calibration(predictions, frame)
    origin = read_origin(predictions)
    evaluation: Evaluation | TargetEvaluation
    if target.kind == "binary":
        assert calibration is None or isinstance(calibration, Calibration)
        if threshold is None:
            fitting = _both_classes(fitting, str(fitted_on), predictions)
            threshold = metrics.best_threshold(fitting["calibrated"], fitting["label"])
        clips = _both_classes(clips, reported, predictions)
        evaluation = _evaluation(clips, reported, threshold, fitted_on, calibration).model_copy(
            update={
                "classes": class_names(frame),
                "tta": None if origin is None else origin.tta,
                "by": by,
                "slices": () if column is None else slices_by(clips, column, threshold),
            }
        )
    else:
        thresholds = label_thresholds(scored(fitting, target), threshold)
        own = scored(clips, target)
        evaluation = evaluate_target(
            own,
            reported,
            thresholds,
            threshold=threshold,
            threshold_fitted_on=fitted_on,
            threshold_fitted_on_same_clips=fitted_on == reported,
            calibration=calibration,
            tta=None if origin is None else origin.tta,
            by=by,
            slices=() if column is None else slices_of(own, clips[column], thresholds),
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, evaluation.model_dump_json(indent=2) + "\n")
    return evaluation


def evaluate(
    predictions: Path,
    *,
    out: Path | None = None,
    threshold: float | None = None,
    by: str | None = None,
) -> Evaluation:
    """Evaluate a table of predictions of two classes, as ``evaluate_any``.

    Raises:
        RunError: as there; or the table is of another target.
        ConfigError: the threshold is not in 0..1.
    """
    kind = target_of_table(read_predictions(predictions)).kind
    if kind != "binary":
        raise RunError(
            f"these are predictions of kind {kind}, not of two classes", where=predictions
        )
    evaluation = evaluate_any(predictions, out=out, threshold=threshold, by=by)
    assert isinstance(evaluation, Evaluation)
    return evaluation


def check_threshold(threshold: float | None) -> None:
    """Raise ``ConfigError`` unless a threshold is None or in 0..1."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(
            f"{threshold:g} is not a probability", where="threshold", fix="Give one in 0..1."
        )


def check_has_threshold(target: Target, threshold: float | None) -> None:
    """Raise ``ConfigError`` for a threshold of a kind that has none."""
    if threshold is not None and target.kind not in ("binary", "multilabel"):
        how = "values" if target.kind == "regression" else "the most probable class"
        raise ConfigError(
            f"kind {target.kind} has none: it predicts {how}",
            where="threshold",
            fix="Leave it out.",
        )


def label_thresholds(val: Scored, threshold: float | None = None) -> dict[str, float]:
    """A threshold of ``calibrated`` for each label of multilabel, fitted as ``val_threshold`` does
    unless one is given; empty for other kinds."""
    if val.target.kind != "multilabel":
        return {}
    return {
        name: _fitted_threshold(val.calibrated[:, k], val.truth[:, k])
        if threshold is None
        else threshold
        for k, name in enumerate(val.target.classes)
    }


def val_threshold(
    calibration: Calibration, probability: metrics.Floats, label: metrics.Floats
) -> float:
    """Threshold of the best MCC on val clips, as ``evaluate`` fits it; 0.5 if they lack a class."""
    return _fitted_threshold(calibration.apply(probability), label)


def _fitted_threshold(calibrated: metrics.Floats, label: ArrayLike) -> float:
    if len(np.unique(label)) < 2:
        return 0.5
    return metrics.best_threshold(calibrated, label)


def _both_classes(clips: pd.DataFrame, split: str, path: Path) -> pd.DataFrame:
    positives = int(clips["label"].sum())
    if not 0 < positives < len(clips):
        raise RunError(
            f"the {len(clips)} labelled {split} clips are all "
            f"{class_names(clips)[1 if positives else 0]}",
            where=path,
            fix="Predict clips of both classes",
        )
    return clips


def _evaluation(
    clips: pd.DataFrame,
    split: Split,
    threshold: float,
    fitted_on: Split | None,
    calibration: Calibration | None,
) -> Evaluation:
    probability, label = clips["probability"].to_numpy(), clips["label"].to_numpy()
    calibrated = clips["calibrated"].to_numpy()
    fixed: dict[str, Any] = metrics.binary_metrics(probability, label)
    counts = tn, fp, fn, tp = metrics.confusion(calibrated, label, threshold)
    mcc_draws, _ = metrics.stratified_bootstrap(calibrated, label, threshold)
    _, auc_draws = metrics.stratified_bootstrap(probability, label, threshold)
    return Evaluation(
        split=split,
        clips=len(clips),
        positives=tp + fn,
        threshold=threshold,
        threshold_fitted_on=fitted_on,
        threshold_fitted_on_same_clips=fitted_on == split,
        mcc=metrics.mcc(counts),
        mcc_ci95=interval_of(mcc_draws),
        mcc_at={str(t): fixed[f"mcc@{t}"] for t in metrics.THRESHOLDS},
        accuracy=(tp + tn) / len(clips),
        auc=fixed["auc"],
        auc_ci95=interval_of(auc_draws),
        ap=fixed["ap"],
        f1=2 * tp / (2 * tp + fp + fn),
        precision=tp / (tp + fp) if tp + fp else None,
        recall=tp / (tp + fn),
        confusion=((tn, fp), (fn, tp)),
        raw=reliability_of(probability, label),
        calibrated=reliability_of(calibrated, label),
        calibration=calibration,
    )


def class_names(frame: pd.DataFrame) -> tuple[str, str]:
    """Names of the labels 0 and 1, by the column ``class`` of the labelled clips."""
    names = dict(CLASSES)
    if "class" in frame:
        known = frame.dropna(subset="label").drop_duplicates("label")
        names |= dict(zip(known["label"].astype(int), known["class"], strict=True))
    return names[0], names[1]
