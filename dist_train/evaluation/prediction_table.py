"""Read what ``predict`` wrote: ``predictions.csv`` and ``calibration.json``."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ValidationError

from dist_train.errors import FileError, RunError
from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.prediction_origin import AGAIN, check_table, read_origin
from dist_train.files import MIB, crc32c, read_plain, reason_of
from dist_train.run.folder import CALIBRATION

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
        ``calibrated`` are float64 in 0..1; ``frames`` is int64; the other columns are text.

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
        if missing := [column for column in COLUMNS if column not in frame]:
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
        _refuse(frame, column, ~frame[column].str.fullmatch(form), expected, path)
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


def read_calibration(predictions: Path, frame: pd.DataFrame) -> Calibration | None:
    """The calibration beside a table of predictions; None if there is none.

    Args:
        frame: the content of ``predictions``.

    Raises:
        RunError: the file is damaged, or is not the calibration of these predictions.
    """
    path = predictions.parent / CALIBRATION
    if not os.path.lexists(path):
        return None
    try:
        content = read_plain(path, most_bytes=MIB)
        calibration = Calibration.model_validate_json(content)
    except (FileError, ValidationError) as error:
        raise RunError("this is not a calibration", where=path, fix=AGAIN) from error
    _, label = val_clips(frame)
    counts = (calibration.clips, calibration.positives)
    calibrated = calibration.apply(frame["probability"])
    origin = read_origin(predictions)
    if (
        counts != (len(label), label.sum())
        or not np.allclose(calibrated, frame["calibrated"], rtol=1e-6, atol=1e-9)
        or (origin and origin.calibration not in (None, crc32c(content)))
    ):
        raise RunError(
            "this is the calibration of other predictions than those beside it",
            where=path,
            fix=AGAIN,
        )
    return calibration


def val_clips(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels, float64 [N] each, of the labelled val clips of a table."""
    val = frame[(frame["split"] == "val") & frame["label"].notna()]
    return val["probability"].to_numpy(), val["label"].to_numpy()
