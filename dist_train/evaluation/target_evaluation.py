"""Metrics of predictions of more than two classes, several labels, or values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dist_train import metrics
from dist_train.class_metrics import METRICS_OF, confusion_matrix
from dist_train.errors import RunError
from dist_train.evaluation.calibration import Reliability
from dist_train.evaluation.class_calibration import (
    ClassCalibration,
    LabelCalibration,
    reliability_of_classes,
    reliability_of_labels,
)
from dist_train.evaluation.slices import Interval, interval_of, shown_values
from dist_train.evaluation.target_table import Scored
from dist_train.metrics import Labels
from dist_train.targets import Target

Split = Literal["val", "test"]
#: Metrics of scores as they are; others are of the predicted class, by ``calibrated``.
OF_SCORES = ("auc", "ap")
#: Draws of a bootstrap, and the fewest for an interval.
RESAMPLES, FEWEST_RESAMPLES = 1000, 100
#: Clips times classes that a bootstrap draws in all: some seconds.
MOST_DRAWN = 4 * 10**7
#: With more classes, an evaluation has no confusion matrix.
MOST_OF_CONFUSION = 1000

Measure = Callable[[Scored], float | None]


class Figure(BaseModel):
    """A metric, None if undefined, with its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    ci95: Interval | None = None
    """None if some draws do not define the metric, or there are too many clips and classes to draw
    ``FEWEST_RESAMPLES``."""


class ClassFigures(BaseModel):
    """Metrics of one class against the rest, or of one label; None if undefined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    clips: int
    """Of the class, or with the label."""
    called: int
    sensitivity: float | None
    precision: float | None
    auc: float | None
    ap: float | None
    threshold: float | None = None
    """Of a label."""


class ValueFigures(BaseModel):
    """Metrics of one value of regression, in its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    metrics: dict[str, Figure]
    bias: float
    """Mean of what is predicted, less the truth."""


class TargetSlice(BaseModel):
    """Metrics of the clips that have one value in a column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    """"" for clips whose value is missing."""
    clips: int
    metrics: dict[str, Figure]


class TargetEvaluation(BaseModel):
    """Metrics of one model on one split.

    The predicted class is the one of the highest ``calibrated`` probability; a label is predicted
    if its ``calibrated`` probability is above the label's threshold. AUC and AP are of
    ``probability``, of each class against the rest. Intervals are over clips redrawn within each
    class, or combination of labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["multiclass", "multilabel", "ordinal", "regression"]
    split: Split
    clips: int
    classes: tuple[str, ...]
    metrics: dict[str, Figure]
    """The main one first."""
    per_class: tuple[ClassFigures, ...] = ()
    per_value: tuple[ValueFigures, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Clips by true class (rows) and predicted class."""
    threshold: float | None = None
    """Of all labels, if it was given."""
    threshold_fitted_on: Split | None = None
    threshold_fitted_on_same_clips: bool = False
    """True if the metrics at the thresholds are optimistic."""
    raw: Reliability | None = None
    """Of ``probability`` on these clips; of labels, the mean over them."""
    calibrated: Reliability | None = None
    calibration: ClassCalibration | LabelCalibration | None = None
    """How ``calibrated`` was computed; None if unknown."""
    tta: str | None = None
    """Test-time augmentation of the predictions; None for none, or unknown."""
    by: str | None = None
    """The column of ``slices``."""
    slices: tuple[TargetSlice, ...] = ()
    """The values with the most clips."""


def evaluate_target(
    clips: Scored, split: Split, thresholds: Mapping[str, float], **more: Any
) -> TargetEvaluation:
    """Evaluate labelled clips.

    Args:
        thresholds: of each label of multilabel.
        more: further fields of the evaluation.

    Raises:
        RunError: all clips are of one class.
    """
    target = clips.target
    assert target.kind != "binary"
    found = TargetEvaluation(
        kind=target.kind,
        split=split,
        clips=len(clips),
        classes=target.classes,
        metrics=figures(clips, thresholds),
        **more,
    )
    if target.kind == "regression":
        return found.model_copy(update={"per_value": _by_value(clips)})
    update: dict[str, Any] = {"per_class": _by_class(clips, thresholds)}
    if target.is_coded:
        codes = np.unique(clips.truth)
        if len(codes) < 2:
            raise RunError(
                f"the {len(clips)} labelled {split} clips are all {target.classes[codes[0]]}",
                fix="Predict clips of several classes",
            )
        if len(target.classes) <= MOST_OF_CONFUSION:
            counts = confusion_matrix(clips.calibrated, clips.truth)
            update["confusion"] = tuple(map(tuple, counts.tolist()))
    reliability = reliability_of_classes if target.is_coded else reliability_of_labels
    update["raw"] = reliability(clips.probability, clips.truth)
    update["calibrated"] = reliability(clips.calibrated, clips.truth)
    return found.model_copy(update=update)


def slices_of(
    clips: Scored, column: pd.Series[str], thresholds: Mapping[str, float]
) -> tuple[TargetSlice, ...]:
    """Metrics of the values of a column of text, as ``slices.slices_by``.

    Args:
        column: the value of each of the clips.
    """
    values = column.to_numpy()
    return tuple(
        TargetSlice(
            value=value,
            clips=int((values == value).sum()),
            metrics=figures(clips[values == value], thresholds),
        )
        for value in shown_values(column)
    )


def figures(clips: Scored, thresholds: Mapping[str, float]) -> dict[str, Figure]:
    """The metrics of the target's kind with intervals, by name."""
    measures = measures_of(clips.target, thresholds)
    values = {name: measure(clips) for name, measure in measures.items()}
    draws: dict[str, list[float | None]] = {name: [] for name in measures}
    for rows in _resampled(clips):
        drawn = clips[rows]
        for name, measure in measures.items():
            draws[name].append(None if values[name] is None else measure(drawn))
    return {
        name: Figure(value=value, ci95=_interval(draws[name])) for name, value in values.items()
    }


def measures_of(target: Target, thresholds: Mapping[str, float]) -> dict[str, Measure]:
    """The metrics of a target that is not binary, by name; each takes one clip or more."""

    def of_kind(name: str) -> Measure:
        function = METRICS_OF[target.kind][name].function
        if name in OF_SCORES or target.kind == "regression":
            return lambda clips: function(clips.probability, clips.truth)
        return lambda clips: function(clips.calibrated, clips.truth)

    found = {name: of_kind(name) for name in METRICS_OF[target.kind]}
    if target.kind == "multilabel":
        above = _above(target, thresholds)
        found["accuracy"] = lambda clips: float(np.mean(above(clips) == clips.truth))
        found["mcc"] = lambda clips: _mean_mcc(above(clips), clips.truth)
    return found


def _above(
    target: Target, thresholds: Mapping[str, float]
) -> Callable[[Scored], NDArray[np.bool_]]:
    edges = np.array([thresholds[name] for name in target.classes])
    return lambda clips: clips.calibrated > edges


def _mean_mcc(called: NDArray[np.bool_], truth: Labels) -> float | None:
    """The mean over the labels that some clips have and some have not."""
    found = [
        metrics.mcc(metrics.confusion(column.astype(np.float64), labels, 0.5))
        for column, labels in zip(called.T, truth.T, strict=True)
        if 0 < labels.sum() < len(labels)
    ]
    return float(np.mean(found)) if found else None


def _resampled(clips: Scored) -> Iterator[Labels]:
    """The places of clips redrawn with replacement within each stratum, int64 [N], time after time;
    the same for the same clips."""
    count, width = clips.probability.shape
    draws = min(RESAMPLES, MOST_DRAWN // max(count * width, 1))
    if draws < FEWEST_RESAMPLES:
        return
    stratum = np.zeros(count, np.int64)
    if clips.target.kind != "regression":
        stratum = np.unique(clips.truth, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum)
    first, size = (np.repeat(of, sizes) for of in (np.cumsum(sizes) - sizes, sizes))
    random = np.random.default_rng(0)
    for _ in range(draws):
        yield order[first + (random.random(count) * size).astype(np.int64)]


def _interval(draws: list[float | None]) -> Interval | None:
    known = [draw for draw in draws if draw is not None]
    return interval_of(np.array(known)) if known and len(known) == len(draws) else None


def _by_class(clips: Scored, thresholds: Mapping[str, float]) -> tuple[ClassFigures, ...]:
    target, found = clips.target, []
    predicted = clips.calibrated.argmax(axis=1)
    for k, name in enumerate(target.classes):
        if target.is_coded:
            truth, called = clips.truth == k, predicted == k
        else:
            truth, called = clips.truth[:, k] == 1, clips.calibrated[:, k] > thresholds[name]
        by_score = metrics.binary_metrics(clips.probability[:, k], truth)
        right = int((truth & called).sum())
        found.append(
            ClassFigures(
                name=name,
                clips=int(truth.sum()),
                called=int(called.sum()),
                sensitivity=right / int(truth.sum()) if truth.any() else None,
                precision=right / int(called.sum()) if called.any() else None,
                auc=by_score["auc"],
                ap=by_score["ap"],
                threshold=thresholds.get(name),
            )
        )
    return tuple(found)


def _by_value(clips: Scored) -> tuple[ValueFigures, ...]:
    found = []
    for v, name in enumerate(clips.target.classes):
        values = clips.probability[:, v : v + 1]
        one = Scored(Target("regression", (name,)), values, values, clips.truth[:, v : v + 1])
        bias = float((values - one.truth).mean())
        found.append(ValueFigures(name=name, metrics=figures(one, {}), bias=bias))
    return tuple(found)
