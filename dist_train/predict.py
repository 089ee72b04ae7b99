"""Probabilities of held-out or new clips, averaged over a run's snapshots."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dist_train.config import Config
from dist_train.data.files import check_writable, write_whole
from dist_train.data.store import REJECTED, Store
from dist_train.engine.checkpoint import by_step
from dist_train.engine.lost_process import losses_explained
from dist_train.engine.metrics import best_threshold, prior_correct
from dist_train.engine.process_group import process_group
from dist_train.engine.together import on_main
from dist_train.ensemble import Progress, mean_probability
from dist_train.errors import ConfigError, RunError
from dist_train.evaluate import read_predictions
from dist_train.micro_batch import most_clips, noted_clips
from dist_train.prediction_origin import check_origin, write_origin
from dist_train.run import RunData, open_run, open_run_data, read_record
from dist_train.run_folder import PREDICTIONS, SNAPSHOT, SNAPSHOTS, SUBMISSION
from dist_train.submission import complete_submission

log = logging.getLogger(__name__)

log = logging.getLogger(__name__)

#: Of the largest tensor of a batch: half a GiB in float32, beyond which no device is faster.
MOST_ELEMENTS = 2**27


def predict(
    run: Path,
    *,
    store: Path | None = None,
    store_path: Path | None = None,
    out: Path | None = None,
    prior: float | None = None,
    threshold: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write ``predictions.csv`` and ``submission.csv`` for the val and test clips of a run. The
    submission has a row for each clip that was asked for: one that the store rejected is of the
    likelier class by the prior, which is told.

    Under a launcher, call it in every process: they share the clips, and rank 0 writes.

    Args:
        run: a run folder with snapshots.
        store: predict all clips of this store instead; they need no labels.
        store_path: where the run's own store is now, if it was moved.
        out: where to write; the run's folder unless another store is given.
        prior: share of positives in the world, to which ``calibrated`` is corrected; the natural
            share of the train split unless given.
        threshold: a clip is called positive in the submission when its probability is greater;
            fitted on the run's val split unless given, and 0.5 where that lacks a class.
        progress: called on rank 0 with (clips done, clips in all) over all snapshots.

    Returns:
        The path of ``predictions.csv``: key, filename, group, split, label (empty if not known),
        probability (mean over snapshots; at the training batches' share of positives), calibrated
        (the same, corrected to ``prior``), frames.

    Raises:
        RunError: no run, no snapshot, nowhere to write, or, for another store, no predictions of
            the run's own that the threshold could be fitted on.
        ConfigError: the prior is not strictly between 0 and 1.
        StoreError: the store cannot be used, or the run's own is not as it was.
        LostProcessError: another process has ended, or cannot be reached.
        OSError: ``out`` cannot be written to, which is tried before anything is predicted.
    """
    if prior is not None and not 0 < prior < 1:
        raise ConfigError(
            f"{prior:g} is no share of positives",
            where="prior",
            fix="Give one strictly between 0 and 1.",
        )
    config = open_run(run)
    snapshots = find_snapshots(run)
    again = "Run the command again: it begins anew."
    with losses_explained(again), process_group(config.train.timeout) as group:
        if store is None:
            data = open_run_data(run, config, store_path=store_path)
            source, chosen = data.store, _held_out(data)
            if chosen.empty:
                raise RunError(
                    "the run was trained on all clips (split.train_on_all), so none is held out",
                    where=run,
                    fix="Predict another store by --store, with --out and --threshold.",
                )
            out = out or run
        else:
            if out is None or out.resolve() == run.resolve():
                raise RunError(
                    "predictions of another store need a folder of their own",
                    where=store,
                    fix="Choose one by --out.",
                )
            source = Store(store)
            chosen = source.table.assign(split="")
            if threshold is None:
                if (run / PREDICTIONS).exists():
                    check_origin(run)
                threshold = _val_threshold(run / PREDICTIONS)
        record, folder = read_record(run), out
        rates = record["positive_rate"]
        world = rates["natural"] if prior is None else prior
        on_main(group, lambda: check_writable(folder))
        probability = mean_probability(
            config,
            snapshots,
            source,
            chosen,
            record,
            group,
            batch=_clips_at_once(config, run, record, chosen),
            progress=progress if group.is_main else None,
        )
        table = pd.DataFrame(
            {
                "key": chosen["key"],
                "filename": chosen["filename"],
                "group": chosen["group"],
                "split": chosen["split"],
                "label": chosen["label"].where(chosen["label"] >= 0).astype("Int64"),
                "probability": probability,
                "calibrated": prior_correct(probability, rates["train_batches"], world),
                "frames": chosen["frames"],
            }
        )
        origin = Origin(snapshots, source)
        on_main(
            group,
            lambda: _write(
                folder,
                table,
                origin,
                threshold,
                only_test=store is None,
                rejected_as=int(world > 0.5),
            ),
        )
    return folder / PREDICTIONS


@dataclass(frozen=True)
class Origin:
    """What predictions are of."""

    snapshots: Sequence[Path]
    store: Store


def _write(
    folder: Path,
    table: pd.DataFrame,
    origin: Origin,
    threshold: float | None,
    *,
    only_test: bool,
    rejected_as: int,
) -> None:
    text = table.to_csv(index=False)
    write_whole(folder / PREDICTIONS, text)
    write_origin(folder / PREDICTIONS, text, origin.snapshots, origin.store.content)
    if threshold is None:
        threshold = _val_threshold(folder / PREDICTIONS)
    submission = pd.DataFrame(
        {
            "filename": table["filename"],
            "stalled": (table["probability"] > threshold).astype(int),
        }
    )
    split = "test" if only_test and (table["split"] == "test").any() else None
    if split is not None:
        submission = submission[(table["split"] == split).to_numpy()]
    submission = _with_rejected(submission, origin.store, split, rejected_as=rejected_as)
    write_whole(folder / SUBMISSION, submission.to_csv(index=False))


def _with_rejected(
    submission: pd.DataFrame, store: Store, split: str | None, *, rejected_as: int
) -> pd.DataFrame:
    complete, rejected = complete_submission(
        submission, store, split=split, rejected_as=rejected_as
    )
    if rejected:
        log.warning(
            "%d of the %d rows of %s are of clips that the store rejected (see %s): they have %d, "
            "the likelier class",
            rejected, len(complete), SUBMISSION, store.folder / REJECTED, rejected_as,
        )  # fmt: skip
    return complete


def find_snapshots(run: Path) -> list[Path]:
    """The snapshots of a run, oldest first.

    Raises:
        RunError: there is none.
    """
    found = [path for _, path in by_step(run / SNAPSHOTS, SNAPSHOT)]
    if not found:
        raise RunError(
            "the run has no snapshot yet",
            where=run,
            fix="Let 'dist-train train' reach one (see the snapshots settings).",
        )
    return found


def _held_out(data: RunData) -> pd.DataFrame:
    return data.clips[data.clips["split"] != "train"]


def _clips_at_once(config: Config, run: Path, record: dict[str, Any], chosen: pd.DataFrame) -> int:
    """A batch that fits where the run was trained, and small enough for a lesser machine.

    It does not depend on this launch, as values that are added up in another order differ in their
    last digits.
    """
    deepest = min(int(chosen["frames"].max()), config.clip.max_frames or sys.maxsize)
    found = [config.plan.batch, most_clips(config, deepest, MOST_ELEMENTS), noted_clips(run)]
    try:
        found.append(int(record["sessions"][-1]["micro_batch"]["clips"]))
    except (LookupError, TypeError, ValueError):
        log.info("%s does not say how large micro-batches were", run)
    return min(clips for clips in found if clips)


def _val_threshold(predictions: Path) -> float:
    """Of the best MCC on the val split, as in ``evaluate``; 0.5 where that lacks a class."""
    table = read_predictions(predictions)
    val = table[(table["split"] == "val") & table["label"].notna()]
    if val["label"].nunique() < 2:
        return 0.5
    return best_threshold(val["probability"], val["label"])
