"""Probabilities of held-out or new clips, averaged over a run's snapshots."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from dist_train.config import Config
from dist_train.data.files import write_whole
from dist_train.data.loader import Loader
from dist_train.data.sampler import HeldOutSampler
from dist_train.data.store import REJECTED, Store
from dist_train.engine.backends.base import autocast
from dist_train.engine.checkpoint import by_step
from dist_train.engine.metrics import best_threshold, prior_correct
from dist_train.errors import ConfigError, RunError
from dist_train.evaluate import read_predictions
from dist_train.infer import held_out_logits
from dist_train.micro_batch import most_clips
from dist_train.prediction_origin import check_origin, write_origin
from dist_train.run import (
    RunData,
    clip_dataset,
    make_model,
    open_run,
    open_run_data,
    read_record,
)
from dist_train.run_folder import PREDICTIONS, SNAPSHOT, SNAPSHOTS, SUBMISSION
from dist_train.snapshots import load_weights, refuse_not_finite
from dist_train.submission import complete_submission

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


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

    Args:
        run: a run folder with snapshots.
        store: predict all clips of this store instead; they need no labels.
        store_path: where the run's own store is now, if it was moved.
        out: where to write; the run's folder unless another store is given.
        prior: share of positives in the world, to which ``calibrated`` is corrected; the natural
            share of the train split unless given.
        threshold: a clip is called positive in the submission when its probability is greater;
            fitted on the run's val split unless given, and 0.5 where that lacks a class.
        progress: called with (clips done, clips in all) over all snapshots.

    Returns:
        The path of ``predictions.csv``: key, filename, group, split, label (empty if not known),
        probability (mean over snapshots; at the training batches' share of positives), calibrated
        (the same, corrected to ``prior``), frames.

    Raises:
        RunError: no run, no snapshot, nowhere to write, or, for another store, no predictions of
            the run's own that the threshold could be fitted on.
        ConfigError: the prior is not strictly between 0 and 1.
        StoreError: the store cannot be used, or the run's own is not as it was.
    """
    if prior is not None and not 0 < prior < 1:
        raise ConfigError(
            f"{prior:g} is no share of positives",
            where="prior",
            fix="Give one strictly between 0 and 1.",
        )
    config = open_run(run)
    snapshots = find_snapshots(run)
    if store is None:
        data = open_run_data(run, config, store_path=store_path)
        source, chosen = data.store, _held_out(data)
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
    record = read_record(run)
    rates = record["positive_rate"]
    world = rates["natural"] if prior is None else prior
    probability = _mean_probability(config, snapshots, source, chosen, record, progress)
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
    out.mkdir(parents=True, exist_ok=True)
    text = table.to_csv(index=False)
    write_whole(out / PREDICTIONS, text)
    write_origin(out / PREDICTIONS, text, snapshots, source.content)
    if threshold is None:
        threshold = _val_threshold(out / PREDICTIONS)
    submission = pd.DataFrame(
        {"filename": table["filename"], "stalled": (probability > threshold).astype(int)}
    )
    split = "test" if store is None and (table["split"] == "test").any() else None
    if split is not None:
        submission = submission[(table["split"] == split).to_numpy()]
    submission = _with_rejected(submission, source, split, rejected_as=int(world > 0.5))
    write_whole(out / SUBMISSION, submission.to_csv(index=False))
    return out / PREDICTIONS


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


def _mean_probability(
    config: Config,
    snapshots: Sequence[Path],
    store: Store,
    chosen: pd.DataFrame,
    record: dict[str, Any],
    progress: Progress | None,
) -> np.ndarray:
    """float64 [N], in the order of ``chosen``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(config).to(device)
    dataset = clip_dataset(config, store, augment=None)
    batch = config.plan.batch
    if device.type == "cuda":
        deepest = min(int(chosen["frames"].max()), config.clip.max_frames or sys.maxsize)
        batch = min(batch, most_clips(config, deepest))
    batches = HeldOutSampler(
        chosen.index.tolist(), chosen["frames"].tolist(), rank=0, world=1, batch=batch
    )
    loader = Loader(dataset, batches, config.loader)
    total, finished = len(chosen) * len(snapshots), 0

    def count(clips: int) -> None:
        nonlocal finished
        finished += clips
        if progress is not None:
            progress(finished, total)

    position = pd.Series(np.arange(len(chosen)), index=chosen.index)
    probability = np.zeros(len(chosen))
    for path in snapshots:
        try:
            model.load_state_dict(load_weights(path, config, record))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"the snapshot does not fit the run ({reason})", where=path) from None
        with autocast(config.train.precision, device):
            clips, logits = held_out_logits(model, loader, config, device, count)
        refuse_not_finite(logits, path)
        probability[position[clips].to_numpy()] += expit(logits.astype(np.float64))
    return probability / len(snapshots)


def _val_threshold(predictions: Path) -> float:
    """Of the best MCC on the val split, as in ``evaluate``; 0.5 where that lacks a class."""
    table = read_predictions(predictions)
    val = table[(table["split"] == "val") & table["label"].notna()]
    if val["label"].nunique() < 2:
        return 0.5
    return best_threshold(val["probability"], val["label"])
