"""Read what ``predict`` wrote: ``predictions.csv`` and ``calibration.json``."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ValidationError

from dist_train.errors import FileError, RunError
from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.class_calibration import CALIBRATIONS, AnyCalibration, LabelCalibration
from dist_train.evaluation.prediction_origin import AGAIN, check_table, read_origin
from dist_train.evaluation.target_table import (
    CALIBRATED,
    PROBABILITY,
    Scored,
    parse_columns,
    scored,
    scores_of,
    target_of_table,
)
from dist_train.files import MIB, crc32c, read_plain, reason_of
from dist_train.run.folder import CALIBRATION
from dist_train.targets import Target

#: Of two classes.
COLUMNS = ("key", "filename", "group", "split", "label", "probability", "calibrated", "frames")

#: Some ten million clips.
MOST_BYTES = 2**31
#: Column -> the form of its values, as a regular expression and in words.
_FORMS = {
    "label": (r"|[01](\.0)?", "0, 1 or empty"),
    "split": ("val|test", "val or test"),
    "frames": ("[0-9]{1,9}", "a whole number"),
}


def read_predictions(path: Path) -> pd.DataFrame:
    """Read and check a table of predictions.

    Returns:
        One row per clip. ``label`` is float64 in {0, 1}, NaN if unknown; ``probability`` and
        ``calibrated`` are float64 in 0..1; ``frames`` is int64; the other columns are text. Of a
        target that is not binary, labels, probabilities and values are as ``parse_columns`` says.

    Raises:
        RunError: the file is missing, is no CSV table, was edited, lacks a column, has two rows of
            one clip, or holds a value of another form.
    """
    if not os.path.lexists(path):
        raise RunError(
            "there are no predictions", where=path, fix="Make them with `dist-train predict`"
        )
    try:
        content = read_plain(path, most_bytes=MOST_BYTES)
        check_table(path, content)
        frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        target = target_of_table(frame)
        needed = COLUMNS if target.kind == "binary" else (*COLUMNS[:4], COLUMNS[-1])
        if missing := [column for column in needed if column not in frame]:
            raise ValueError(f"the table has no column {', '.join(missing)}")
    except (FileError, ValueError) as error:
        raise RunError(
            f"this is no table of predictions ({reason_of(error)})", where=path, fix=AGAIN
        ) from None
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
    for column, (form, expected) in _FORMS.items():
        if column in needed:
            _refuse(frame, column, ~frame[column].str.fullmatch(form), expected, path)
    if target.kind != "binary":
        parse_columns(frame, target, partial(_refuse, frame, path=path))
        frame["frames"] = frame["frames"].astype(np.int64)
        return frame
    for column in ("probability", "calibrated"):
        numbers = pd.to_numeric(frame[column], errors="coerce")
        _refuse(frame, column, ~numbers.between(0, 1), "a number between 0 and 1", path)
        frame[column] = numbers
    frame["label"] = frame["label"].replace("", "nan").astype(np.float64)
    frame["frames"] = frame["frames"].astype(np.int64)
    return frame


def _refuse(
    frame: pd.DataFrame, column: str, wrong: pd.Series[bool], expected: str, path: Path
) -> None:
    """Raise for the first wrong value of a column."""
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise RunError(
            f"{column} is '{frame[column].iloc[row]}', not {expected}",
            where=f"{path}, clip {frame['key'].iloc[row]}",
            fix=AGAIN,
        )


def read_calibration(predictions: Path, frame: pd.DataFrame) -> AnyCalibration | None:
    """The calibration beside a table of predictions; None if there is none.

    Args:
        frame: the content of ``predictions``.

    Raises:
        RunError: the file is damaged, or is not the calibration of these predictions.
    """
    path = predictions.parent / CALIBRATION
    target = target_of_table(frame)
    if not os.path.lexists(path) or target.kind == "regression":
        return None
    try:
        content = read_plain(path, most_bytes=MIB)
        calibration = CALIBRATIONS[target.kind].model_validate_json(content)
    except (FileError, ValidationError) as error:
        raise RunError("this is not a calibration", where=path, fix=AGAIN) from error
    origin = read_origin(predictions)
    if not _belongs(calibration, frame, target) or (
        origin and origin.calibration not in (None, crc32c(content))
    ):
        raise RunError(
            "this is the calibration of other predictions than those beside it",
            where=path,
            fix=AGAIN,
        )
    return calibration


def _belongs(calibration: AnyCalibration, frame: pd.DataFrame, target: Target) -> bool:
    """Whether a calibration was fitted on a table's val clips, and gives its ``calibrated``."""
    truth = val_clips(frame).truth
    if isinstance(calibration, Calibration):
        fitted = (calibration.clips, calibration.positives) == (len(truth), truth.sum())
        columns = [frame[name].to_numpy() for name in (PROBABILITY, CALIBRATED)]
    else:
        columns = [scores_of(frame, target, kind) for kind in (PROBABILITY, CALIBRATED)]
        if isinstance(calibration, LabelCalibration):
            counts = [(c.clips, c.positives) for c in calibration.labels.values()]
            fitted = tuple(calibration.labels) == target.classes
            fitted &= counts == [(len(truth), positives) for positives in truth.sum(axis=0)]
        else:
            there = np.bincount(truth, minlength=len(target.classes))
            fitted = calibration.counts == tuple(there.tolist())
    if not fitted:
        return False
    return np.allclose(calibration.apply(columns[0]), columns[1], rtol=1e-6, atol=1e-9)


def val_clips(frame: pd.DataFrame) -> Scored:
    """The labelled val clips of a table."""
    target = target_of_table(frame)
    val = frame[frame["split"] == "val"]
    if target.kind != "binary":
        return scored(val, target)
    val = val[val["label"].notna()]
    columns = (val[name].to_numpy() for name in ("probability", "calibrated", "label"))
    return Scored(target, *columns)
