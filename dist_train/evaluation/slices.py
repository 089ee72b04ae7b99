"""Metrics of the clips that have one value in a column: a group, or metadata of the clip table."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from dist_train import metrics
from dist_train.data.types import METADATA, metadata_columns
from dist_train.errors import RunError

log = logging.getLogger(__name__)

Interval = tuple[float, float]

#: Most values of a column whose metrics are computed.
MOST_SLICES = 50


class Slice(BaseModel):
    """Metrics of the clips that have one value in a column.

    MCC is at the evaluation's threshold, and its interval is as there. MCC and AP are None if the
    clips are of one class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    """"" for clips whose value is missing."""
    clips: int
    positives: int
    confusion: tuple[tuple[int, int], tuple[int, int]]
    mcc: float | None = None
    mcc_ci95: Interval | None = None
    ap: float | None = None


def column_of(frame: pd.DataFrame, by: str, path: Path) -> str:
    """The column of a table of predictions by its name in the clip table.

    Raises:
        RunError: there is none.
    """
    known = {name.removeprefix(METADATA): name for name in metadata_columns(frame)}
    known |= {"group": "group"}
    if by not in known:
        near = difflib.get_close_matches(by, known, n=1)
        raise RunError(
            f"there is no column '{by}'",
            where=path,
            fix=f"Did you mean '{near[0]}'?"
            if near
            else f"There are: {', '.join(known)}. The clip table's further columns are kept when a "
            "store is prepared.",
        )
    return known[by]


def slices_by(clips: pd.DataFrame, column: str, threshold: float) -> tuple[Slice, ...]:
    """Metrics of the ``MOST_SLICES`` values with the most clips, and of a missing value last.

    Args:
        clips: labelled clips of ``read_predictions``.
    """
    return tuple(
        _slice(value, clips[clips[column] == value], threshold)
        for value in shown_values(clips[column])
    )


def shown_values(column: pd.Series[str]) -> list[str]:
    """The ``MOST_SLICES`` values with the most clips, and a missing value last; warns of more."""
    counts = column.value_counts()
    values = sorted(counts.index, key=lambda value: (-counts[value], value))
    if len(values) > MOST_SLICES:
        log.warning(
            "of the %d values of '%s' the %d with the most clips are shown",
            len(values), str(column.name).removeprefix(METADATA), MOST_SLICES,
        )  # fmt: skip
    shown = [value for value in values[:MOST_SLICES] if value]
    return shown + ([""] if "" in counts else [])


def _slice(value: str, clips: pd.DataFrame, threshold: float) -> Slice:
    calibrated, label = clips["calibrated"].to_numpy(), clips["label"].to_numpy()
    counts = tn, fp, fn, tp = metrics.confusion(calibrated, label, threshold)
    found = Slice(value=value, clips=len(clips), positives=tp + fn, confusion=((tn, fp), (fn, tp)))
    if not 0 < tp + fn < len(clips):
        return found
    draws, _ = metrics.stratified_bootstrap(calibrated, label, threshold)
    update = {
        "mcc": metrics.mcc(counts),
        "mcc_ci95": interval_of(draws),
        "ap": metrics.binary_metrics(clips["probability"], label)["ap"],
    }
    return found.model_copy(update=update)


def interval_of(draws: metrics.Floats) -> Interval:
    """The 95 % interval of the draws of a bootstrap."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
