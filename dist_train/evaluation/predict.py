"""Scores of held-out or new clips, averaged over a run's snapshots."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dist_train.checkpoint.format import by_step
from dist_train.config import Config, TargetSettings
from dist_train.data.store.reader import Store
from dist_train.data.types import CLASSES, metadata_columns
from dist_train.distributed.collectives import on_main
from dist_train.distributed.device import chosen_cuda
from dist_train.distributed.peer_loss import translate_peer_loss
from dist_train.distributed.process_group import process_group
from dist_train.errors import RunError
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.class_calibration import AnyCalibration
from dist_train.evaluation.ensemble import mean_scores
from dist_train.evaluation.evaluate import (
    check_has_threshold,
    check_threshold,
    label_thresholds,
    val_threshold,
)
from dist_train.evaluation.flips import Tta, views_of
from dist_train.evaluation.prediction_origin import (
    check_origin,
    origin_file,
    read_origin,
    write_origin,
)
from dist_train.evaluation.prediction_table import (
    COLUMNS,
    read_predictions,
    val_clips,
)
from dist_train.evaluation.submission import make_submission
from dist_train.evaluation.target_predict import (
    Prior,
    calibrate,
    check_prior,
    labels_elsewhere,
)
from dist_train.evaluation.target_table import PREDICTED, Scored, columns_of
from dist_train.files import check_replaceable, check_writable, is_plain, open_plain, write_whole
from dist_train.places import Location
from dist_train.progress import Progress
from dist_train.run.data import check_channels, frames_of, open_run_data, warn_of_other_values
from dist_train.run.folder import CALIBRATION, CONFIG, PREDICTIONS, SNAPSHOT, SNAPSHOTS, SUBMISSION
from dist_train.run.model import target_of
from dist_train.run.record import open_run, read_record, warn_of_other_code
from dist_train.safe_text import for_spreadsheet
from dist_train.targets import Target
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
    prior: Prior | None = None,
    threshold: float | None = None,
    tta: Tta = "none",
    progress: Progress | None = None,
) -> Path:
    """Write ``predictions.csv`` and, for two classes, ``submission.csv`` for the val and test clips
    of a run.

    The submission has a row for each clip of the manifest's split: a clip that the store rejected
    gets the likelier class by the prior, with a warning. Under a launcher, call it in every
    process: they share the clips, and rank 0 writes.

    Args:
        run: a run folder with snapshots.
        store: predict all clips of this store instead; they need no labels.
        store_path: where the run's own store is now, if it was moved.
        out: folder to write to. Default: the run's, unless ``store`` is given.
        prior: share of positives in the world, to which ``calibrated`` is corrected; of more
            classes, or labels, the share of each by name. Default: the natural share of the train
            split.
        threshold: a clip is called positive in the submission, or has a label of multilabel, if its
            calibrated probability is greater. Default: fitted on the run's val split, or 0.5 if
            that lacks a class.
        tta: "flips" averages over mirrored and reversed clips, too; ``predictions.json`` names it.
        progress: called on rank 0 with (clips done, clips in all) over all snapshots.

    Returns:
        The path of ``predictions.csv``: key, filename, group, split, label (empty if unknown),
        probability (mean over snapshots, at the training batches' share of positives), calibrated
        (mapped as ``calibration.py`` says, at ``prior``), frames, class (the label's name, if the
        store has names), and the store's metadata. ``calibration.json`` beside it holds the
        mapping. Of targets that are not binary, ``target_table.columns_of`` says which columns
        stand for label, probability and calibrated.

    Raises:
        RunError: there is no run, snapshot or folder to write to, or, for another store, no
            predictions of the run's own to fit the threshold on.
        ConfigError: the prior is not strictly between 0 and 1, or the threshold not in 0..1, or
            either does not fit the kind of target; or the run was trained without the flips of
            ``tta``.
        BackendError: the device that ``train.device`` or the launcher asks for is not there.
        StoreError: the store cannot be used, or the run's own has changed.
        LostProcessError: another process has ended, or cannot be reached.
        OSError: ``out`` cannot be written, which is checked before anything is predicted.
    """
    check_threshold(threshold)
    config = open_run(run)
    target = target_of(config.target)
    check_prior(target, prior)
    check_has_threshold(target, threshold)
    views_of(tta, config.augment)
    snapshots = find_snapshots(run)
    again = "Run the command again: it begins anew."
    # Each process predicts with all weights, whichever backend trained them.
    cuda = chosen_cuda(config.train.model_copy(update={"backend": "ddp"}))
    with translate_peer_loss(again), process_group(config.train.timeout, cuda=cuda) as group:
        if store is None:
            source, chosen, labels = _held_out(run, config, store_path)
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
            labels = chosen["label"].to_numpy()
            if config.target != TargetSettings():
                labels = labels_elsewhere(config, target, source)
            elif max(source.classes) > 1:
                log.warning(
                    "%s: its labels are not used, as it has more than two classes", source.name
                )
                labels = np.full(len(chosen), -1)
            needs_threshold = threshold is None and target.kind in ("binary", "multilabel")
            if needs_threshold and config.split.train_on_all:
                raise RunError(
                    "the run holds out no clips to fit the threshold on (split.train_on_all)",
                    where=run,
                    fix="Give one by --threshold.",
                )
            if needs_threshold:
                read_predictions(run / PREDICTIONS)
            if target.kind != "regression":
                _check_same_tta(run, tta)
        record = read_record(run)
        on_main(group, lambda: _check_place(folder, run))
        if group.is_main:
            warn_of_other_code(run, config, record)
            warn_of_other_values(record, source)
        scores = mean_scores(
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
        val = _val_clips(run, chosen, target, labels, scores, own=store is None)
        columns, calibration, submitted = results_of(
            chosen, source, target, labels, scores, val, record, prior, threshold
        )
        if calibration is not None:
            used = tuple(path.name for path in snapshots)
            calibration = calibration.model_copy(update={"snapshots": used})
        table = chosen[["key", "filename", "group", "split"]].assign(**columns)
        metadata = metadata_columns(chosen)
        table[metadata] = chosen[metadata]
        submission = None
        if submitted is not None:
            submission = make_submission(
                table, submitted.threshold, source, rejected_as=submitted.rejected_as
            )

        def write() -> None:
            # People open it in spreadsheets. The submission keeps the names of its form.
            texts = {"filename", "group", "class", PREDICTED, *metadata} & set(table)
            safe = {str(name): table[name].map(for_spreadsheet) for name in texts}
            text = table.assign(**safe).to_csv(index=False)
            write_whole(folder / PREDICTIONS, text)
            mapping = None
            if calibration is not None:
                mapping = calibration.model_dump_json(indent=2) + "\n"
            write_origin(folder / PREDICTIONS, text, mapping, snapshots, source.content, tta)
            called = None if submission is None else submission.to_csv(index=False)
            for name, content in ((CALIBRATION, mapping), (SUBMISSION, called)):
                if content is not None:
                    write_whole(folder / name, content)
                elif os.path.lexists(folder / name):
                    # Predictions of another target were here.
                    log.warning("%s is removed: it is of other predictions", folder / name)
                    (folder / name).unlink()

        on_main(group, write)
    return folder / PREDICTIONS


class _Submitted(NamedTuple):
    """How a submission calls clips."""

    threshold: float
    rejected_as: int


def results_of(
    chosen: pd.DataFrame,
    source: Store,
    target: Target,
    labels: np.ndarray,
    scores: np.ndarray,
    val: Scored,
    record: dict[str, Any],
    prior: Prior | None,
    threshold: float | None,
) -> tuple[dict[str, Any], AnyCalibration | None, _Submitted | None]:
    """The columns of the table that belong to the kind of target, the calibration, and, of two
    classes, how the submission calls clips.

    Args:
        labels, scores: of the ``chosen`` clips.
        val: of the run's labelled val clips.
        record: ``positive_rate`` of two classes, ``class_shares`` of other kinds that have classes.
    """
    frames, columns = chosen["frames"], dict[str, Any]()
    if target.kind != "binary":
        calibration = calibrate(val, record.get("class_shares", {}), prior)
        calibrated = scores if calibration is None else calibration.apply(scores)
        if calibration is not None:
            val = replace(val, calibrated=calibration.apply(val.probability))
        thresholds = label_thresholds(val, threshold)
        columns = columns_of(target, labels, scores, calibrated, thresholds)
        return columns | {"frames": frames}, calibration, None
    assert prior is None or isinstance(prior, (int, float))
    rates = record["positive_rate"]
    world: float = rates["natural"] if prior is None else prior
    fitted = fit(val.probability, val.truth, batches_share=rates["train_batches"], prior=world)
    label = pd.Series(labels, chosen.index)
    columns = {
        "label": label.where(label >= 0).astype("Int64"),
        "probability": scores,
        "calibrated": fitted.apply(scores),
        "frames": frames,
    }
    names = {code: source.classes[code] for code in (0, 1)}
    if target != Target():
        names = dict(enumerate(target.classes))
    if names != {0: CLASSES[0], 1: CLASSES[1]}:
        columns["class"] = label.map(names).fillna("")
    if threshold is None:
        threshold = val_threshold(fitted, val.probability, val.truth)
    return columns, fitted, _Submitted(threshold, rejected_as=int(world > 0.5))


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


def _held_out(
    run: Path, config: Config, store_path: Location | None
) -> tuple[Store, pd.DataFrame, np.ndarray]:
    """The run's store, its val and test clips, and their labels as ``TargetLabels.values``."""
    data = open_run_data(run, config, store_path=store_path)
    clips = data.held_out
    if clips.empty:
        raise RunError(
            "the run was trained on all clips (split.train_on_all), so none is held out",
            where=run,
            fix="Predict another store by --store, with --out and --threshold.",
        )
    return data.store, clips, data.target_labels.values[clips.index]


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
        return file.readline(1000).startswith(",".join(COLUMNS[:5]).encode())


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
    run: Path,
    chosen: pd.DataFrame,
    target: Target,
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    own: bool,
) -> Scored:
    """The run's labelled val clips, from the clips just predicted or, for another store, from the
    run's own predictions; none if there are none. ``calibrated`` is not of use."""
    if not own:
        if (run / PREDICTIONS).is_file():
            check_origin(run)
            return val_clips(read_predictions(run / PREDICTIONS))
        scores, labels = scores[:0], labels[:0]
        chosen = chosen[:0]
    known = labels >= 0 if target.is_coded else ~np.isnan(labels).any(axis=1)
    val = (chosen["split"] == "val").to_numpy() & known
    truth = labels[val]
    truth = truth.astype(np.float64 if target.kind in ("binary", "regression") else np.int64)
    return Scored(target, scores[val], scores[val], truth)
