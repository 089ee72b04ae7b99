"""Read what the report shows of a run folder."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError

from dist_train.checkpoint.format import by_step
from dist_train.data.check.result import CheckResult, read_result
from dist_train.errors import ConfigError, FileError, RunError
from dist_train.evaluation.evaluate import Evaluation, evaluate_any
from dist_train.evaluation.prediction_origin import check_origin
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.evaluation.slices import column_of
from dist_train.evaluation.target_evaluation import TargetEvaluation
from dist_train.evaluation.target_table import is_labelled, target_of_table
from dist_train.files import MIB, read_plain
from dist_train.run.folder import (
    CHECK,
    CONFIG,
    EVALUATION,
    METRICS,
    PREDICTIONS,
    SNAPSHOT,
    SNAPSHOTS,
)
from dist_train.run.record import read_record
from dist_train.targets import Kind
from dist_train.training.metrics_log import MOST_BYTES, parse_metrics

log = logging.getLogger(__name__)

#: Room for the confusion of a thousand classes.
MOST_OF_EVALUATION = 64 * MIB
_EVALUATION: TypeAdapter[Evaluation | TargetEvaluation] = TypeAdapter(Evaluation | TargetEvaluation)


@dataclass(frozen=True)
class Run:
    """What a run folder holds; None or empty if a file is not there yet."""

    path: Path
    steps: pd.DataFrame
    """Metrics by optimizer step. A step that was repeated after a resume counts once."""
    info: dict[str, Any]
    settings: str | None
    predictions: pd.DataFrame | None
    """The labelled clips of the evaluated split."""
    evaluation: Evaluation | TargetEvaluation | None
    check: CheckResult | None
    """What ``dist-train check`` found in the store of the training."""
    snapshots: int

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last_step(self) -> int:
        return int(self.steps.index[-1])

    @property
    def kind(self) -> Kind:
        """Of the target."""
        kind: Kind = self.info.get("target", {}).get("kind", "binary")
        return kind

    @property
    def holds_out_clips(self) -> bool:
        return not self.info["settings"]["split"]["train_on_all"]

    @property
    def resumed_from(self) -> list[int]:
        """The last step before each resume."""
        steps = [session["resumed_from_step"] for session in self.info["sessions"]]
        return [step for step in steps if step is not None]

    def series(self, name: str) -> pd.Series[float]:
        """Values of a metric by step, where it is defined."""
        values = self.steps.get(name, pd.Series(dtype=np.float64))
        return values.astype(np.float64).dropna()

    def median(self, name: str, form: str) -> str:
        """The formatted median of a metric."""
        values = self.series(name)
        return form.format(values.median()) if len(values) else "–"

    @property
    def training_time(self) -> str:
        """Hours, minutes and seconds between steps, without the pauses between sessions."""
        time = self.series("time")
        gaps = time.shift(-1) - time
        seconds = gaps[~gaps.index.isin(self.resumed_from)].sum()
        try:
            return str(timedelta(seconds=round(seconds)))
        except OverflowError:
            return "–"


def read_run(run: Path) -> Run:
    """Read a run folder, also while the training writes it.

    Raises:
        RunError: as ``write_report``.
    """
    predictions = evaluation = None
    if os.path.lexists(run / PREDICTIONS):
        check_origin(run)
        evaluation = _evaluate(run)
        table = read_predictions(run / PREDICTIONS)
        known = is_labelled(table, target_of_table(table))
        predictions = table[known & (table["split"] == evaluation.split)]
    info = read_record(run)
    return Run(
        path=run,
        steps=_read_steps(run / METRICS),
        info=info,
        settings=_read_settings(run / CONFIG),
        predictions=predictions,
        evaluation=evaluation,
        check=_read_check(run / CHECK, info),
        snapshots=len(by_step(run / SNAPSHOTS, SNAPSHOT)),
    )


def _evaluate(run: Path) -> Evaluation | TargetEvaluation:
    """Evaluate the predictions, at the threshold and by the column that the user gave to
    ``evaluate`` for them."""
    given = stored_evaluation(run / EVALUATION)
    by = None if given is None else _by_of(run, given)
    if given is None or given.threshold_fitted_on is not None or given.threshold is None:
        return evaluate_any(run / PREDICTIONS, by=by)
    with suppress(ConfigError):
        evaluation = evaluate_any(run / PREDICTIONS, threshold=given.threshold, by=by)
        if _called(given) == _called(evaluation):
            return evaluation
    log.warning(
        "%s is of other predictions, so its threshold is not used. Run `dist-train evaluate` again",
        run / EVALUATION,
    )
    return evaluate_any(run / PREDICTIONS)


def _called(e: Evaluation | TargetEvaluation) -> tuple[Any, ...]:
    """What tells evaluations of other predictions apart."""
    counts = e.confusion if isinstance(e, Evaluation) else [c.called for c in e.per_class]
    return e.split, e.clips, counts


def _by_of(run: Path, given: Evaluation | TargetEvaluation) -> str | None:
    """The column of a stored evaluation, if the predictions have it."""
    if given.by is None:
        return None
    try:
        column_of(read_predictions(run / PREDICTIONS), given.by, run / PREDICTIONS)
    except RunError as error:
        log.warning(
            "%s is of other predictions, so its column is not used (%s). Run `dist-train evaluate` "
            "again",
            run / EVALUATION, error.what,
        )  # fmt: skip
        return None
    return given.by


def stored_evaluation(path: Path) -> Evaluation | TargetEvaluation | None:
    """The content of ``evaluation.json``; None if there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        return _EVALUATION.validate_json(_read(path, MOST_OF_EVALUATION))
    except ValidationError as error:
        raise RunError(
            "this is not an evaluation", where=path, fix="Run `dist-train evaluate` again"
        ) from error


def _read_check(path: Path, info: dict[str, Any]) -> CheckResult | None:
    """The result of a check of the run's store; None if there is none, or if it is of another."""
    if not os.path.lexists(path):
        return None
    try:
        result = read_result(path)
    except FileError as error:
        raise RunError(error.what, where=path, fix=error.fix) from None
    if result.content == info.get("store", {}).get("content"):
        return result
    log.warning("%s is of another store than the run's, and is not shown", path)
    return None


def _read_steps(path: Path) -> pd.DataFrame:
    if not os.path.lexists(path):
        raise RunError("the run has no metrics", where=path, fix="Train it with `dist-train train`")
    lines = _read(path, MOST_BYTES).splitlines(keepends=True)
    steps: dict[int, dict[str, Any]] = {}
    for number, values in enumerate(parse_metrics(lines), start=1):
        if values is not None:
            steps[values["step"]] = values
        # The run may still be writing the last line.
        elif number < len(lines) or lines[-1].endswith(b"\n"):
            raise RunError(
                "the line is not as a step was written",
                where=f"{path}, line {number}",
                fix="Restore the file, or delete the line",
            )
    if not steps:
        raise RunError("no step has finished yet", where=path, fix="Wait for the first step")
    if (lost := max(steps) - len(steps)) > 0:
        log.warning("%s lacks the metrics of %d steps", path, lost)
    return pd.DataFrame.from_dict(steps, orient="index").sort_index()


def _read_settings(path: Path) -> str | None:
    try:
        return _read(path, MIB).decode() if os.path.lexists(path) else None
    except UnicodeDecodeError as error:
        raise RunError(f"this is no text ({error})", where=path) from None


def _read(path: Path, most: int) -> bytes:
    try:
        return read_plain(path, most_bytes=most)
    except FileError as error:
        raise RunError(error.what, where=path) from None
