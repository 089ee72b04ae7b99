"""Probabilities of held-out or new clips, averaged over a run's snapshots."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.special import expit

from dist_train.config import Config
from dist_train.data.files import write_whole
from dist_train.data.loader import Loader
from dist_train.data.sampler import HeldOutSampler
from dist_train.data.store import Store
from dist_train.engine.backends.base import autocast
from dist_train.engine.calibration import fit
from dist_train.engine.checkpoint import by_step
from dist_train.errors import ConfigError, RunError
from dist_train.evaluate import (
    CALIBRATION,
    PREDICTIONS,
    read_predictions,
    val_clips,
    val_threshold,
)
from dist_train.infer import held_out_logits
from dist_train.micro_batch import most_clips
from dist_train.run import (
    SNAPSHOTS,
    RunData,
    clip_dataset,
    make_model,
    open_data,
    open_run,
    read_record,
)
from dist_train.state import SNAPSHOT

SUBMISSION = "submission.csv"
Progress = Callable[[int, int], None]


def predict(
    run: Path,
    *,
    store: Path | None = None,
    out: Path | None = None,
    prior: float | None = None,
    threshold: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write ``predictions.csv`` and ``submission.csv`` for the val and test clips of a run.

    Args:
        run: a run folder with snapshots.
        store: predict all clips of this store instead; they need no labels.
        out: where to write; the run's folder unless another store is given.
        prior: share of positives in the world, to which ``calibrated`` is corrected; the natural
            share of the train split unless given.
        threshold: a clip is called positive in the submission when its calibrated probability is
            greater; fitted on the run's val split unless given, and 0.5 where that lacks a class.
        progress: called with (clips done, clips in all) over all snapshots.

    Returns:
        The path of ``predictions.csv``: key, filename, group, split, label (empty if not known),
        probability (mean over snapshots; at the training batches' share of positives), calibrated
        (the same by the mapping that is fitted on the run's val split, and then corrected to
        ``prior``; see ``engine/calibration.py``), frames. ``calibration.json`` beside it has the
        mapping.

    Raises:
        RunError: no run, no snapshot, nowhere to write, or, for another store, no predictions of
            the run's own that the threshold could be fitted on.
        ConfigError: the prior is not strictly between 0 and 1.
        StoreError: the store cannot be used.
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
        data = open_data(config)
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
            read_predictions(run / PREDICTIONS)
    rates = read_record(run)["positive_rate"]
    world = rates["natural"] if prior is None else prior
    probability = _mean_probability(config, snapshots, source, chosen, progress)
    val = _val_clips(run, chosen, probability, own=store is None)
    calibration = fit(*val, batches_share=rates["train_batches"], prior=world)
    calibration = calibration.model_copy(update={"snapshots": tuple(p.name for p in snapshots)})
    calibrated = calibration.apply(probability)
    table = pd.DataFrame(
        {
            "key": chosen["key"],
            "filename": chosen["filename"],
            "group": chosen["group"],
            "split": chosen["split"],
            "label": chosen["label"].where(chosen["label"] >= 0).astype("Int64"),
            "probability": probability,
            "calibrated": calibrated,
            "frames": chosen["frames"],
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / PREDICTIONS, table.to_csv(index=False))
    write_whole(out / CALIBRATION, calibration.model_dump_json(indent=2) + "\n")
    if threshold is None:
        threshold = val_threshold(calibration, *val)
    submission = pd.DataFrame(
        {"filename": table["filename"], "stalled": (calibrated > threshold).astype(int)}
    )
    if store is None and (table["split"] == "test").any():
        submission = submission[(table["split"] == "test").to_numpy()]
    write_whole(out / SUBMISSION, submission.to_csv(index=False))
    return out / PREDICTIONS


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
            model.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"the snapshot does not fit the run ({reason})", where=path) from None
        with autocast(config.train.precision, device):
            clips, logits = held_out_logits(model, loader, config, device, count)
        probability[position[clips].to_numpy()] += expit(logits.astype(np.float64))
    return probability / len(snapshots)


def _val_clips(
    run: Path, chosen: pd.DataFrame, probability: np.ndarray, *, own: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the run's labelled val clips: of those just predicted, or for
    another store by the run's own predictions; none where there are no such."""
    if own:
        val = ((chosen["split"] == "val") & (chosen["label"] >= 0)).to_numpy()
        return probability[val], chosen["label"].to_numpy(np.float64)[val]
    if not (run / PREDICTIONS).is_file():
        return np.empty(0), np.empty(0)
    return val_clips(read_predictions(run / PREDICTIONS))
