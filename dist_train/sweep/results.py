"""What came out of a sweep: a row a trial, and a row a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pydantic import ValidationError
from rich.table import Table
from scipy.stats import kendalltau

from dist_train.errors import DistTrainError, FileError, RunError
from dist_train.evaluation.evaluate import Evaluation, label_thresholds
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.evaluation.target_evaluation import measures_of
from dist_train.evaluation.target_table import is_labelled, scored, target_of_table
from dist_train.files import MIB, parse_json, read_plain, write_whole
from dist_train.metrics import Floats
from dist_train.run.folder import EVALUATION, PREDICTIONS
from dist_train.run.folder import METRICS as LINES
from dist_train.run.record import read_record
from dist_train.sweep.folder import folder_of, state_of
from dist_train.sweep.goal import Goal
from dist_train.sweep.intervals import Sample, interval, resampled, share_above, value_of
from dist_train.sweep.settings import FITTED, trial_metrics
from dist_train.sweep.trials import Trial

RESULTS, TABLE, PLOT = "results.csv", "table.csv", "sweep.png"


class Results(NamedTuple):
    """The results of a sweep.

    Attributes:
        trials: a row a trial: variant, seed, fold, state, its metrics, train_seconds and error.
        table: a row a variant, the best first: trials, failed, mean, sd and 95 % interval of the
            metric, share of draws in which it is better than the next, reference, train_seconds.
        agreement: Kendall's tau of the order with that of the references, and its interval; None
            if fewer than two variants have one, or all are equal.
    """

    metric: str
    trials: pd.DataFrame
    table: pd.DataFrame
    agreement: tuple[float, float, float] | None


def collect(
    out: Path,
    trials: Sequence[Trial],
    goal: Goal,
    failed: Mapping[str, str],
    reference: Mapping[str, float],
) -> Results:
    """Read the results of all trials that are done, and write ``results.csv`` and ``table.csv``.

    Args:
        failed: why trials failed, by name.
    """
    rows, samples, names = [], [], trial_metrics(goal.kind)
    for trial in trials:
        row: dict[str, object] = {
            "trial": trial.name, "variant": trial.variant, "seed": trial.config.seed,
            "fold": trial.config.split.fold, "state": "failed" if trial.name in failed else "open",
            "error": failed.get(trial.name, ""),
        }  # fmt: skip
        if trial.name not in failed and state_of(out, trial) == "done":
            folder = folder_of(out, trial.name)
            try:
                own = samples_of(folder, trial, names)
                row |= {name: value_of(sample, name) for name, sample in own.items()}
                samples.append(own[goal.metric])
                row |= {"state": "done", "train_seconds": train_seconds(folder)}
            except DistTrainError as error:
                row |= {"state": "failed", "error": str(error)}
        rows.append(row)
    frame = pd.DataFrame(rows, columns=[*rows[0], *(n for n in (*names, "train_seconds")
                                                    if n not in rows[0])])  # fmt: skip
    write_whole(out / RESULTS, frame.to_csv(index=False))
    draws = resampled(samples, goal.metric) if samples else {}
    table = _table(frame, goal, draws, reference)
    write_whole(out / TABLE, table.to_csv(index=False))
    return Results(goal.metric, frame, table, _agreement(table, draws))


def samples_of(folder: Path, trial: Trial, metrics: Sequence[str]) -> dict[str, Sample]:
    """The held-out clips of a trial that each metric is of.

    Raises:
        RunError: predictions or evaluation cannot be used.
    """
    frame = read_predictions(folder / PREDICTIONS)
    target, run = target_of_table(frame), (trial.config.seed, trial.config.split.fold)
    labelled = frame[is_labelled(frame, target)]
    clips_of = {split: labelled[labelled["split"] == split] for split in ("val", "test")}
    keys = {split: clips["key"].to_numpy(object) for split, clips in clips_of.items()}
    if target.kind == "binary":
        fitted = _fitted_threshold(folder) if FITTED in metrics else None

        def of_two_classes(metric: str) -> Sample:
            split = metric.partition("/")[0]
            clips, is_fitted = clips_of[split], metric == FITTED
            return Sample(
                trial.variant, run, keys[split], clips["label"].to_numpy(np.int64),
                clips["calibrated" if is_fitted else "probability"].to_numpy(),
                fitted if is_fitted else None,
            )  # fmt: skip

        return {metric: of_two_classes(metric) for metric in metrics}
    known = {split: scored(clips, target) for split, clips in clips_of.items()}
    thresholds = label_thresholds(known["val"] if len(known["val"]) else known["test"])
    measures = measures_of(target, thresholds)

    def of_kind(metric: str) -> Sample:
        split, _, name = metric.partition("/")
        own, measure = known[split], measures[name]
        return Sample(trial.variant, run, keys[split], own.truth, own.calibrated, None,
                      lambda places: measure(own[places]))  # fmt: skip

    return {metric: of_kind(metric) for metric in metrics}


def _fitted_threshold(folder: Path) -> float:
    try:
        content = read_plain(folder / EVALUATION, most_bytes=MIB)
        return Evaluation.model_validate_json(content).threshold
    except (FileError, ValidationError):
        raise RunError(
            "this is no evaluation",
            where=folder / EVALUATION,
            fix="Delete it, and call the sweep again.",
        ) from None


def train_seconds(folder: Path) -> float:
    """Seconds from the beginning of each session of a training to its last step that counts; NaN
    for a trial without a training."""
    try:
        sessions = read_record(folder)["sessions"]
        lines = read_plain(folder / LINES, most_bytes=1 << 33).splitlines()
    except (RunError, FileError):
        return np.nan
    starts = [datetime.fromisoformat(session["started"]).timestamp() for session in sessions]
    times = np.sort([parse_json(line)["time"] for line in lines])
    seconds = 0.0
    for start, end in zip(starts, [*starts[1:], np.inf], strict=True):
        own = times[(times >= start) & (times < end)]
        seconds += float(own[-1] - start) if len(own) else 0.0
    return seconds


def _table(
    frame: pd.DataFrame, goal: Goal, draws: Mapping[str, Floats], reference: Mapping[str, float]
) -> pd.DataFrame:
    rows = []
    for name, own in frame.groupby("variant", sort=False):
        variant = str(name)
        done = own[own["state"] == "done"]
        values = done[goal.metric].astype(np.float64)
        low, high = interval(draws[variant]) if variant in draws else (np.nan, np.nan)
        rows.append(
            {
                "variant": variant,
                "trials": len(done),
                "failed": int((own["state"] == "failed").sum()),
                "mean": values.mean(),
                "sd": values.std(),
                "low": low,
                "high": high,
                "reference": reference.get(variant, np.nan),
                "train_seconds": done["train_seconds"].astype(np.float64).mean(),
            }
        )
    table = pd.DataFrame(rows).sort_values(
        "mean", ascending=not goal.is_higher_better, kind="stable"
    )
    order = [draws.get(name) for name in table["variant"]]
    above = [np.nan if a is None or b is None
             else share_above(a, b) if goal.is_higher_better else share_above(b, a)
             for a, b in zip(order, [*order[1:], None], strict=True)]  # fmt: skip
    table.insert(7, "above_next", above)
    return table.reset_index(drop=True)


def _agreement(
    table: pd.DataFrame, draws: Mapping[str, Floats]
) -> tuple[float, float, float] | None:
    known = table[table["reference"].notna() & table["mean"].notna()]
    if len(known) < 2:
        return None
    there = known["reference"].to_numpy()
    of_draws = np.array([draws[name] for name in known["variant"]])
    taus = np.array([kendalltau(there, values).statistic for values in of_draws.T])
    tau = float(kendalltau(there, known["mean"]).statistic)
    # All means, or all references, may be equal.
    return None if np.isnan(tau) else (tau, *interval(taus))


def listing(out: Path, trials: Sequence[Trial]) -> Table:
    """The trials and what is there of each, for the terminal."""
    view = Table(title=f"{len(trials)} trials in {out}", title_justify="left")
    for name in ("trial", "model", "kind", "state"):
        view.add_column(name)
    for trial in trials:
        kind = trial.kind if trial.of is None else f"predicts with {trial.of}"
        kind += "" if trial.tta == "none" else f", {trial.tta}"
        model = trial.config.model.name if trial.kind == "train" else ""
        view.add_row(trial.name, model, kind, state_of(out, trial))
    return view


def table_text(results: Results) -> Table:
    """The table of variants for the terminal."""
    title = f"{results.metric}, mean over trials; 95 % CI: bootstrap over clips and trials"
    view = Table(title=title, title_justify="left")
    has_reference = results.table["reference"].notna().any()
    for name in ("variant", "trials", "mean", "sd", "95 % CI", "above next", "minutes"):
        view.add_column(name, justify="left" if name == "variant" else "right")
    if has_reference:
        view.add_column("reference", justify="right")
    for row in results.table.to_dict("records"):
        trials = f"{row['trials']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        low, high = _number(row["low"]), _number(row["high"])
        view.add_row(
            row["variant"], trials, _number(row["mean"]), _number(row["sd"]), f"{low}–{high}",
            _number(row["above_next"], ".0%"), _number(row["train_seconds"] / 60, ".1f"),
            *([_number(row["reference"])] if has_reference else []),
        )  # fmt: skip
    return view


def _number(value: float, form: str = ".3f") -> str:
    return "–" if np.isnan(value) else format(value, form)
