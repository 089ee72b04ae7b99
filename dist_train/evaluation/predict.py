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
from dist_train.data.store.reader import Store
from dist_train.data.types import CLASSES, metadata_columns
from dist_train.distributed.collectives import on_main
from dist_train.distributed.device import chosen_cuda
from dist_train.distributed.peer_loss import translate_peer_loss
from dist_train.distributed.process_group import process_group
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.ensemble import mean_probability
from dist_train.evaluation.evaluate import check_threshold, val_threshold
from dist_train.evaluation.flips import Tta, views_of
from dist_train.evaluation.prediction_origin import (
    check_origin,
    origin_file,
    read_origin,
    write_origin,
)
from dist_train.evaluation.prediction_table import COLUMNS, read_predictions, val_clips
from dist_train.evaluation.submission import make_submission
from dist_train.files import check_replaceable, check_writable, is_plain, open_plain, write_whole
from dist_train.places import Location
from dist_train.progress import Progress
from dist_train.run.data import check_channels, frames_of, open_run_data, warn_of_other_values
from dist_train.run.folder import CALIBRATION, CONFIG, PREDICTIONS, SNAPSHOT, SNAPSHOTS, SUBMISSION
from dist_train.run.record import open_run, read_record, warn_of_other_code
from dist_train.safe_text import for_spreadsheet
from dist_train.training.micro_batch import most_clips
from dist_train.training.micro_batch_note import noted_clips

log = logging.getLogger(__name__)

#: Elements of a batch's largest tensor: half a GiB in float32. No device is faster beyond that.
MOST_ELEMENTS = 2**27


def predict(
    run: Path,
    *,
    store: Location | None = None,
    store_path: Location | None = None,
    out: Path | None = None,
    prior: float | None = None,
    threshold: float | None = None,
    tta: Tta = "none",
    progress: Progress | None = None,
) -> Path:
    """Write ``predictions.csv`` and ``submission.csv`` for the val and test clips of a run.

    The submission has a row for each clip of the manifest's split: a clip that the store rejected
    gets the likelier class by the prior, with a warning. Under a launcher, call it in every
    process: they share the clips, and rank 0 writes.

    Args:
        run: a run folder with snapshots.
        store: predict all clips of this store instead; they need no labels.
        store_path: where the run's own store is now, if it was moved.
        out: folder to write to. Default: the run's, unless ``store`` is given.
        prior: share of positives in the world, to which ``calibrated`` is corrected. Default: the
            natural share of the train split.
        threshold: a clip is called positive in the submission if its calibrated probability is
            greater. Default: fitted on the run's val split, or 0.5 if that lacks a class.
        tta: "flips" averages over mirrored and reversed clips, too; ``predictions.json`` names it.
        progress: called on rank 0 with (clips done, clips in all) over all snapshots.

    Returns:
        The path of ``predictions.csv``: key, filename, group, split, label (empty if unknown),
        probability (mean over snapshots, at the training batches' share of positives), calibrated
        (mapped as ``calibration.py`` says, at ``prior``), frames, class (the label's name, if the
        store has names), and the store's metadata. ``calibration.json`` beside it holds the
        mapping.

    Raises:
        RunError: there is no run, snapshot or folder to write to, or, for another store, no
            predictions of the run's own to fit the threshold on.
        ConfigError: the prior is not strictly between 0 and 1, or the threshold not in 0..1; or
            the run was trained without the flips of ``tta``.
        BackendError: the device that ``train.device`` or the launcher asks for is not there.
        StoreError: the store cannot be used, or the run's own has changed.
        LostProcessError: another process has ended, or cannot be reached.
        OSError: ``out`` cannot be written, which is checked before anything is predicted.
    """
    if prior is not None and not 0 < prior < 1:
        raise ConfigError(
            f"{prior:g} is no share of positives",
            where="prior",
            fix="Give one strictly between 0 and 1.",
        )
    check_threshold(threshold)
    config = open_run(run)
    views_of(tta, config.augment)
    snapshots = find_snapshots(run)
    again = "Run the command again: it begins anew."
    # Each process predicts with all weights, whichever backend trained them.
    cuda = chosen_cuda(config.train.model_copy(update={"backend": "ddp"}))
    with translate_peer_loss(again), process_group(config.train.timeout, cuda=cuda) as group:
        if store is None:
            source, chosen = _held_out(run, config, store_path)
            folder = out or run
        else:
            if out is None or out.resolve() == run.resolve():
                raise RunError(
                    "predictions of another store need a folder of their own",
                    where=store,
                    fix="Choose one by --out.",
                )
            source, folder = Store(store, config.cache), out
            check_channels(config, source)
            chosen = source.table.frame().assign(split="")
            if threshold is None and config.split.train_on_all:
                raise RunError(
                    "the run holds out no clips to fit the threshold on (split.train_on_all)",
                    where=run,
                    fix="Give one by --threshold.",
                )
            if threshold is None:
                read_predictions(run / PREDICTIONS)
            _check_same_tta(run, tta)
        record = read_record(run)
        rates = record["positive_rate"]
        world = rates["natural"] if prior is None else prior
        on_main(group, lambda: _check_place(folder, run))
        if group.is_main:
            warn_of_other_code(run, config, record)
            warn_of_other_values(record, source)
        probability = mean_probability(
            config,
            snapshots,
            source,
            chosen,
            record,
            group,
            tta=tta,
            batch=_clips_at_once(config, run, record, frames_of(source, config.clip)[chosen.index]),
            progress=progress if group.is_main else None,
        )
        val = _val_clips(run, chosen, probability, own=store is None)
        calibration = fit(*val, batches_share=rates["train_batches"], prior=world)
        used = tuple(path.name for path in snapshots)
        calibration = calibration.model_copy(update={"snapshots": used})
        table = chosen[["key", "filename", "group", "split"]].assign(
            label=chosen["label"].where(chosen["label"] >= 0).astype("Int64"),
            probability=probability,
            calibrated=calibration.apply(probability),
            frames=chosen["frames"],
        )
        names = {label: source.classes[label] for label in (0, 1)}
        if names != {0: CLASSES[0], 1: CLASSES[1]}:
            table["class"] = chosen["label"].map(names).fillna("")
        metadata = metadata_columns(chosen)
        table[metadata] = chosen[metadata]
        if threshold is None:
            threshold = val_threshold(calibration, *val)
        submission = make_submission(table, threshold, source, rejected_as=int(world > 0.5))

        def write() -> None:
            # People open it in spreadsheets. The submission keeps the names of its form.
            texts = {"filename", "group", "class", *metadata} & set(table)
            safe = {str(name): table[name].map(for_spreadsheet) for name in texts}
            text = table.assign(**safe).to_csv(index=False)
            write_whole(folder / PREDICTIONS, text)
            mapping = calibration.model_dump_json(indent=2) + "\n"
            write_origin(folder / PREDICTIONS, text, mapping, snapshots, source.content, tta)
            write_whole(folder / CALIBRATION, mapping)
            write_whole(folder / SUBMISSION, submission.to_csv(index=False))

        on_main(group, write)
    return folder / PREDICTIONS


def find_snapshots(run: Path) -> list[Path]:
    """Snapshots of a run, oldest first.

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


def _held_out(run: Path, config: Config, store_path: Location | None) -> tuple[Store, pd.DataFrame]:
    """The run's store, and its val and test clips."""
    data = open_run_data(run, config, store_path=store_path)
    clips = data.held_out
    if clips.empty:
        raise RunError(
            "the run was trained on all clips (split.train_on_all), so none is held out",
            where=run,
            fix="Predict another store by --store, with --out and --threshold.",
        )
    return data.store, clips


def _check_place(folder: Path, run: Path) -> None:
    """Refuse, before anything is predicted, a folder that cannot be written, or that holds files of
    another program or run under the same names."""
    check_writable(folder)
    table = folder / PREDICTIONS
    names = (table, origin_file(table), folder / CALIBRATION, folder / SUBMISSION)
    for path in names:
        check_replaceable(path)
    if folder.resolve() == run.resolve():
        return
    there = [path.name for path in names if os.path.lexists(path)]
    if os.path.lexists(folder / CONFIG) or (there and not _is_table(table)):
        raise RunError(
            "the folder is another run's, or holds files of other programs "
            f"('{there[0] if there else CONFIG}' is in it)",
            where=folder,
            fix="Choose a new folder by --out.",
        )


def _check_same_tta(run: Path, tta: Tta) -> None:
    """Refuse to calibrate by predictions of the run with another test-time augmentation."""
    origin = read_origin(run / PREDICTIONS)
    own = "none" if origin is None or origin.tta is None else origin.tta
    if origin is not None and own != tta:
        raise RunError(
            f"the run's own predictions, which give the calibration, are with --tta {own}",
            where=run / PREDICTIONS,
            fix=f"Give --tta {own}, or predict the run's own clips with --tta {tta} first.",
        )


def _is_table(path: Path) -> bool:
    """Whether a file begins like a table of predictions."""
    if not is_plain(path):
        return False
    with open_plain(path) as file:
        return file.readline(1000).rstrip(b"\n").split(b",")[: len(COLUMNS)] == [
            name.encode() for name in COLUMNS
        ]


def _clips_at_once(config: Config, run: Path, record: dict[str, Any], frames: np.ndarray) -> int:
    """Clips per batch: as many as fitted in training, and few enough for a smaller machine.

    It does not depend on this launch, because sums in another order differ in their last digits.
    """
    deepest = min(int(frames.max()), config.clip.max_frames or sys.maxsize)
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
    """Probabilities and labels of the run's labelled val clips, from the clips just predicted or,
    for another store, from the run's own predictions; empty if there are none."""
    if own:
        val = ((chosen["split"] == "val") & (chosen["label"] >= 0)).to_numpy()
        return probability[val], chosen["label"].to_numpy(np.float64)[val]
    if not (run / PREDICTIONS).is_file():
        return np.empty(0), np.empty(0)
    check_origin(run)
    return val_clips(read_predictions(run / PREDICTIONS))
