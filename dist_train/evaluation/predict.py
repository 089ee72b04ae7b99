"""Probabilities of held-out or new clips, averaged over a run's snapshots."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.checkpoint.format import by_step
from dist_train.config import Config
from dist_train.data.store.reader import REJECTED, Store
from dist_train.distributed.collectives import on_main, translate_peer_loss
from dist_train.distributed.process_group import process_group
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.ensemble import mean_probability
from dist_train.evaluation.evaluate import (
    CALIBRATION,
    COLUMNS,
    read_predictions,
    val_clips,
    val_threshold,
)
from dist_train.evaluation.prediction_origin import check_origin, origin_file, write_origin
from dist_train.evaluation.submission import complete_submission
from dist_train.files import check_replaceable, check_writable, is_plain, open_plain, write_whole
from dist_train.progress import Progress
from dist_train.run.data import RunData, open_run_data
from dist_train.run.folder import CONFIG, PREDICTIONS, SNAPSHOT, SNAPSHOTS, SUBMISSION
from dist_train.run.record import open_run, read_record, warn_of_other_code
from dist_train.safe_text import for_spreadsheet
from dist_train.training.micro_batch import most_clips
from dist_train.training.micro_batch_note import noted_clips

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
        threshold: a clip is called positive in the submission when its calibrated probability is
            greater; fitted on the run's val split unless given, and 0.5 where that lacks a class.
        progress: called on rank 0 with (clips done, clips in all) over all snapshots.

    Returns:
        The path of ``predictions.csv``: key, filename, group, split, label (empty if not known),
        probability (mean over snapshots; at the training batches' share of positives), calibrated
        (the same by the mapping that is fitted on the run's val split, and then corrected to
        ``prior``; see ``calibration.py``), frames. ``calibration.json`` beside it has the mapping.

    Raises:
        RunError: no run, no snapshot, nowhere to write, or, for another store, no predictions of
            the run's own that the threshold could be fitted on.
        ConfigError: the prior is not strictly between 0 and 1, or the threshold not in 0..1.
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
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(
            f"{threshold:g} is not a probability", where="threshold", fix="Give one in 0..1."
        )
    config = open_run(run)
    snapshots = find_snapshots(run)
    again = "Run the command again: it begins anew."
    with translate_peer_loss(again), process_group(config.train.timeout) as group:
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
                read_predictions(run / PREDICTIONS)
        record, folder = read_record(run), out
        rates = record["positive_rate"]
        world = rates["natural"] if prior is None else prior
        on_main(group, lambda: _check_place(folder, run))
        if group.is_main:
            warn_of_other_code(run, config, record)
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
        val = _val_clips(run, chosen, probability, own=store is None)
        calibration = fit(*val, batches_share=rates["train_batches"], prior=world)
        used = tuple(path.name for path in snapshots)
        calibration = calibration.model_copy(update={"snapshots": used})
        calibrated = calibration.apply(probability)
        if threshold is None:
            threshold = val_threshold(calibration, *val)
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
        split = None
        if store is None:
            split = "test" if (table["split"] == "test").any() else "val"
        submission = _submission(table, threshold, source, split, rejected_as=int(world > 0.5))

        def write() -> None:
            # People open it in spreadsheets; the form of the submission has its names as they are.
            names = {name: table[name].map(for_spreadsheet) for name in ("filename", "group")}
            text = table.assign(**names).to_csv(index=False)
            write_whole(folder / PREDICTIONS, text)
            write_origin(folder / PREDICTIONS, text, snapshots, source.content)
            write_whole(folder / CALIBRATION, calibration.model_dump_json(indent=2) + "\n")
            write_whole(folder / SUBMISSION, submission.to_csv(index=False))

        on_main(group, write)
    return folder / PREDICTIONS


def _check_place(folder: Path, run: Path) -> None:
    """Refuse, before anything is predicted, a folder that cannot be written to, or in which files
    of somebody else have the names."""
    check_writable(folder)
    table = folder / PREDICTIONS
    names = (table, origin_file(table), folder / CALIBRATION, folder / SUBMISSION)
    for path in names:
        check_replaceable(path)
    if folder.resolve() == run.resolve():
        return
    there = [path for path in names if os.path.lexists(path)]
    header = f"{','.join(COLUMNS)}\n".encode()
    if os.path.lexists(folder / CONFIG) or (there and not _begins_with(table, header)):
        found = there[0].name if there else CONFIG
        raise RunError(
            f"the folder is another run's, or holds files of other programs ('{found}' is in it)",
            where=folder,
            fix="Choose a new folder by --out.",
        )


def _begins_with(path: Path, header: bytes) -> bool:
    if not is_plain(path):
        return False
    with open_plain(path) as file:
        return file.read(len(header)) == header


def _submission(
    table: pd.DataFrame, threshold: float, store: Store, split: str | None, *, rejected_as: int
) -> pd.DataFrame:
    if split is not None:
        table = table[table["split"] == split]
    called = pd.DataFrame(
        {"filename": table["filename"], "stalled": (table["calibrated"] > threshold).astype(int)}
    )
    complete, rejected = complete_submission(called, store, split=split, rejected_as=rejected_as)
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
    most = most_clips(config.model, (deepest, *config.clip.size), MOST_ELEMENTS)
    found = [config.plan.batch, most, noted_clips(run)]
    try:
        found.append(int(record["sessions"][-1]["micro_batch"]["clips"]))
    except (LookupError, TypeError, ValueError):
        log.info("%s does not say how large micro-batches were", run)
    return min(clips for clips in found if clips)


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
    check_origin(run)
    return val_clips(read_predictions(run / PREDICTIONS))
