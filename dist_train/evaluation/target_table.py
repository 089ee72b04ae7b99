"""The columns of ``predictions.csv`` that hold labels and scores, for kinds of target other than
binary: a column for each class, label or value, such as ``probability:flowing``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dist_train.data.types import CLASS_CODE
from dist_train.metrics import Floats
from dist_train.targets import Target

LABEL, PROBABILITY, CALIBRATED, VALUE = "label", "probability", "calibrated", "value"
PREDICTED, EXPECTED = "predicted", "expected"
NUMBER = r"-?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?"
#: Called with the name of a column, which values are wrong, and what is expected.
Refuse = Callable[[str, "pd.Series[bool]", str], None]


@dataclass(frozen=True)
class Scored:
    """Scores and labels of some clips.

    Attributes:
        probability: as ``Target.scores``, float64 [N, K]; of regression the values.
        calibrated: float64 [N, K]; of regression the values.
        truth: as ``Target.truth``; not of clips without labels.
    """

    target: Target
    probability: Floats
    calibrated: Floats
    truth: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Scored:
        """Some of the clips, by bool [N] or by their places."""
        return Scored(
            self.target, self.probability[chosen], self.calibrated[chosen], self.truth[chosen]
        )

    def __len__(self) -> int:
        return len(self.truth)


def columns_of(
    target: Target,
    labels: np.ndarray,
    probability: Floats,
    calibrated: Floats,
    thresholds: Mapping[str, float],
) -> dict[str, Any]:
    """The columns, in their order.

    - multiclass and ordinal: ``label`` (code, empty if unknown), ``class`` (its name),
      ``predicted`` (name of the class of the highest calibrated probability), and, of ordinal,
      ``expected`` (mean code by calibrated probabilities); ``probability:NAME`` and
      ``calibrated:NAME`` of each class.
    - multilabel: ``label:NAME``, ``predicted:NAME`` (1 if the calibrated probability is above the
      label's threshold), ``probability:NAME`` and ``calibrated:NAME``.
    - regression: ``label:NAME`` and ``value:NAME``, in the unit of the labels.

    Args:
        labels: class codes [N], below 0 for none; or [N, K], NaN for none.
        thresholds: of each label of multilabel.
    """
    names = np.array(target.classes, object)
    found: dict[str, Any] = {}
    if target.is_coded:
        known = labels >= 0
        found[LABEL] = pd.array(np.where(known, labels, np.nan), "Int64")
        found["class"] = np.where(known, names[np.where(known, labels, 0)], "")
        found[PREDICTED] = names[calibrated.argmax(axis=1)]
        if target.kind == "ordinal":
            found[EXPECTED] = calibrated @ np.arange(len(names))
    else:
        is_value = target.kind == "regression"
        for name, column in zip(names, labels.T, strict=True):
            found[f"{LABEL}:{name}"] = column if is_value else pd.array(column, "Int64")
        if is_value:
            return found | _named(VALUE, names, probability)
        called = calibrated > np.array([thresholds[name] for name in names])
        found |= _named(PREDICTED, names, called.astype(np.int64))
    return found | _named(PROBABILITY, names, probability) | _named(CALIBRATED, names, calibrated)


def _named(kind: str, names: Iterable[str], values: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{kind}:{name}": column for name, column in zip(names, values.T, strict=True)}


def target_of_table(columns: Iterable[object]) -> Target:
    """The target of a table of predictions, by the names of its columns; regression without center
    and scale.

    Raises:
        ValueError: it is that of no kind.
    """
    there = [str(column) for column in columns]
    names = {kind: _names(there, kind) for kind in (LABEL, PROBABILITY, CALIBRATED, VALUE)}
    if PROBABILITY in there or not (names[PROBABILITY] or names[VALUE]):
        return Target()
    if values := names[VALUE]:
        target = Target("regression", values)
        complete = names[LABEL] == values
    elif LABEL in there:
        target = Target("ordinal" if EXPECTED in there else "multiclass", names[PROBABILITY])
        complete = names[CALIBRATED] == target.classes and len(target.classes) > 1
    else:
        target = Target("multilabel", names[PROBABILITY])
        complete = names[CALIBRATED] == names[LABEL] == target.classes
    if not complete:
        raise ValueError("the table has not each column of each class")
    return target


def _names(columns: Iterable[str], kind: str) -> tuple[str, ...]:
    return tuple(c.removeprefix(f"{kind}:") for c in columns if c.startswith(f"{kind}:"))


def parse_columns(frame: pd.DataFrame, target: Target, refuse: Refuse) -> None:
    """Check labels and scores of a table of text, and replace them by numbers: float64, NaN for an
    unknown label."""
    if target.is_coded:
        right = frame[LABEL].str.fullmatch(rf"|({CLASS_CODE})(\.0)?")
        code = pd.to_numeric(frame[LABEL].where(right, ""), errors="coerce")
        refuse(LABEL, ~right | (code >= len(target.classes)), "the code of a class, or empty")
        frame[LABEL] = code.astype(np.float64)
    else:
        is_value = target.kind == "regression"
        form, said = (NUMBER, "a number") if is_value else (r"[01](\.0)?", "0, 1")
        for name in target.classes:
            column = f"{LABEL}:{name}"
            refuse(column, ~frame[column].str.fullmatch(f"|{form}"), f"{said} or empty")
            frame[column] = pd.to_numeric(frame[column], errors="coerce").astype(np.float64)
        if is_value:
            for name in target.classes:
                column = f"{VALUE}:{name}"
                numbers = pd.to_numeric(frame[column], errors="coerce")
                refuse(column, ~np.isfinite(numbers), "a number")
                frame[column] = numbers.astype(np.float64)
            return
    for kind in (PROBABILITY, CALIBRATED):
        for name in target.classes:
            numbers = pd.to_numeric(frame[f"{kind}:{name}"], errors="coerce")
            refuse(f"{kind}:{name}", ~numbers.between(0, 1), "a number between 0 and 1")
            frame[f"{kind}:{name}"] = numbers.astype(np.float64)
        total = frame[[f"{kind}:{name}" for name in target.classes]].sum(axis=1)
        if target.is_coded:
            expected = "one that makes a sum of 1 over the classes"
            refuse(f"{kind}:{target.classes[0]}", (total - 1).abs() > 1e-6, expected)


def scored(frame: pd.DataFrame, target: Target) -> Scored:
    """The labelled clips of a table that ``parse_columns`` has read."""
    kinds = (VALUE, VALUE) if target.kind == "regression" else (PROBABILITY, CALIBRATED)
    frame = frame[is_labelled(frame, target)]
    probability, calibrated = (scores_of(frame, target, kind) for kind in kinds)
    labels = frame[_label_columns(target)].to_numpy(np.float64)
    truth = labels if target.kind == "regression" else labels.astype(np.int64)
    return Scored(target, probability, calibrated, truth[:, 0] if target.is_coded else truth)


def scores_of(frame: pd.DataFrame, target: Target, kind: str = PROBABILITY) -> Floats:
    """The columns of one kind, float64 [N, K]."""
    return frame[[f"{kind}:{name}" for name in target.classes]].to_numpy(np.float64)


def is_labelled(frame: pd.DataFrame, target: Target) -> np.ndarray:
    """Which clips have all labels: bool [N]."""
    known: np.ndarray = frame[_label_columns(target)].notna().all(axis=1).to_numpy()
    return known


def _label_columns(target: Target) -> list[str]:
    return [LABEL] if target.is_coded else [f"{LABEL}:{name}" for name in target.classes]
