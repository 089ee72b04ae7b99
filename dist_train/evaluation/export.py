"""A run's model as one file: safetensors for PyTorch, ONNX for everything else."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from dist_train.checkpoint.format import by_step, latest_valid, load_checkpoint
from dist_train.config import Config
from dist_train.errors import DistTrainError, RunError
from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.card_of_run import card_of_run
from dist_train.evaluation.class_calibration import AnyCalibration
from dist_train.evaluation.evaluate import label_thresholds, val_threshold
from dist_train.evaluation.model_card import card_paths, check_card_places, write_card
from dist_train.evaluation.onnx_model import check_packages, onnx_bytes
from dist_train.evaluation.prediction_origin import check_origin, read_origin
from dist_train.evaluation.prediction_table import (
    read_calibration,
    read_predictions,
    val_clips,
)
from dist_train.files import check_replaceable, write_whole
from dist_train.models.registry import require
from dist_train.places import Location
from dist_train.run.data import open_run_data
from dist_train.run.folder import CHECKPOINTS, PREDICTIONS, SNAPSHOT, SNAPSHOTS, refuse_own_place
from dist_train.run.model import model_metadata, model_of, target_of
from dist_train.run.record import code_from_outside, open_run, read_record, warn_of_other_code
from dist_train.run.snapshots import (
    check_finite,
    fit_weights,
    load_into,
    save_snapshot,
    snapshot_metadata,
    stored_checksum,
)
from dist_train.training.fresh_statistics import statistics_of_run
from dist_train.training.run_state import EVALUATED, evaluated_weights

log = logging.getLogger(__name__)

RESIZING = (
    "area averaging along an axis that shrinks, then bilinear along one that grows (OpenCV), "
    "rounded to the dtype of the pixels"
)
#: How a clip becomes the model's input.
PREPROCESSING = {
    "channels": "one: grey, uint8, 0 black and 255 white; colour is converted when the store is "
    "made, and an outline is cropped to if the store was made so",
    "frames": "a clip of more than max_frames is cut to those in its middle, from frame "
    "(frames - max_frames) // 2 on",
    "resize": f"each frame to size (height, width): {RESIZING}",
    "scale": "divided by 255, to float32 of 0 to 1",
    "padding": "clips of a batch are padded with frames at their end, which change nothing",
}


def preprocessing(config: Config) -> dict[str, str]:
    """``PREPROCESSING`` as the settings of a run have it."""
    changed: dict[str, str] = {}
    if config.model.channels is not None:
        changed["channels"] = (
            f"{len(config.model.channels)}, in this order: {', '.join(config.model.channels)}; "
            "uint8, or uint16 for values of 0 to 65535, or float16 for values of 0 to 1"
        )
        changed["scale"] = "divided by the dtype's largest value, to float32 of 0 to 1"
    z, y, x = config.clip.spacing or (None, None, None)
    if z is not None or config.clip.fps is not None:
        to = f"{config.clip.fps:g} frames a second" if z is None else f"{z:g} um"
        changed["depth"] = f"resampled to {to}, linearly between frames, before frames are cut"
    if y is not None:
        changed["resize"] = (
            f"each frame to pixels of {y:g} by {x:g} um (height, width): {RESIZING}; "
            "then cropped or padded with black around its middle to size"
        )
    return PREPROCESSING | changed


class _Source(NamedTuple):
    """Where the weights of one step are."""

    step: int
    path: Path
    kind: Literal["snapshot", "checkpoint"]


def export_run(
    run: Path,
    out: Path,
    *,
    onnx: Path | None = None,
    step: int | None = None,
    store_path: Location | None = None,
) -> dict[str, Any]:
    """Write the model of a run, as ``predict`` uses it: all its snapshots in one file, whose scores
    are averaged. A run without snapshots gives its newest valid checkpoint. A model card is written
    beside ``out``, with the suffixes ".md" and ".json" in place of its own.

    ``load_exported`` reads the safetensors file. The ONNX model takes ``volumes``, float32
    [B, C, D, H, W] of 0 to 1, with the run's H and W, and ``frames``, int64 [B], the real frames of
    each clip, from 1 to D. B and D are free. The content of padded frames is ignored. It gives the
    mean over the snapshots: ``probability``, float32 [B] or, of K classes or labels, [B, K]; or, of
    regression, ``value``, [B, V]. And it gives ``logits``, float32 [B, snapshots] or
    [B, snapshots, outputs].

    Args:
        out: the safetensors file to write.
        onnx: the ONNX file to write, if any.
        step: export the snapshot, or else the checkpoint, of this step alone. Then the names of the
            tensors are those of the network, and there is no calibration.
        store_path: where the run's store is now, if it was moved. Only a checkpoint within an epoch
            needs the store; without it the card lacks counts and sizes of clips.

    Returns:
        The metadata that both files hold as JSON under "facts": those of a snapshot (``step``, the
        last one, ``model``, ``target`` unless it is the store's two classes, ``clip``, ``store``,
        ``data``, and in the files ``crc32c`` of the safetensors file); ``steps``; ``from``
        ("snapshots", "snapshot" or "checkpoint"); ``networks`` (the prefix of each network's
        tensors); ``precision`` (in which ``predict`` computes); ``preprocessing``;
        ``positive_rate`` (of the training batches, and natural) or, of further classes,
        ``class_shares`` (of each); ``calibration`` (the content of calibration.json; None without
        predictions, and of regression); and ``threshold`` (of the calibrated probability; of
        multilabel, of each label by name; None of other kinds).

    Raises:
        RunError: there is no run, or it has no weights, or they do not fit it; ONNX is not
            installed; a name is given twice, or is one of the run's own; or the predictions or the
            calibration are of other snapshots.
        ModelError: the model has no ONNX form.
        CheckpointError: all checkpoints are damaged.
        FileError: ``out`` or ``onnx`` exists and is not a plain file, or a file that the card would
            replace is no card.
        OSError: a file cannot be written.
    """
    config = open_run(run)
    outputs = [path for path in (out, onnx) if path is not None]
    cards = card_paths(out)
    for path in (*outputs, *cards):
        check_replaceable(path)
        refuse_own_place(run, path)
    if onnx is not None:
        check_packages()
        require(config.model.name, "onnx", "--onnx")
        if onnx.resolve() == out.resolve():
            raise RunError(
                "the safetensors and the ONNX file have the same name",
                where=out,
                fix="Give --out and --onnx different ones.",
            )
    if taken := {path.resolve() for path in outputs} & {path.resolve() for path in cards}:
        raise RunError(
            "the model card of the export has this name",
            where=taken.pop(),
            fix="Give the ONNX file the suffix .onnx.",
        )
    check_card_places(out)
    sources = _find_weights(run, step)
    record = read_record(run)
    warn_of_other_code(run, config, record)
    models = [_load(run, config, record, source, store_path) for source in sources]
    calibration, threshold = None, None
    is_whole = step is None and sources[0].kind == "snapshot"
    if is_whole:
        calibration, threshold = _calibration(run, config, sources)
    many = len(sources) > 1
    prefixes = [f"step-{source.step}/" for source in sources] if many else [""]
    content = record["store"]["content"]
    facts: dict[str, Any] = snapshot_metadata(config, sources[-1].step, content)
    shares: dict[str, Any] = {
        key: record[key] for key in ("positive_rate", "class_shares") if key in record
    }
    facts |= {
        "steps": [source.step for source in sources],
        "from": "snapshots" if many else sources[0].kind,
        "networks": prefixes,
        "precision": config.train.precision,
        "preprocessing": preprocessing(config),
        **shares,
        "calibration": None if calibration is None else calibration.model_dump(mode="json"),
        "threshold": threshold,
    }
    if code := code_from_outside(config):
        facts["code_from_outside"] = code
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        prefix + name: tensor.contiguous()
        for prefix, model in zip(prefixes, models, strict=True)
        for name, tensor in model.state_dict().items()
    }
    for path in cards:
        # A kill must not leave the card of other weights.
        path.unlink(missing_ok=True)
    save_snapshot(out, weights, facts)
    crc32c = stored_checksum(out)
    if onnx is not None:
        sealed = facts | {"crc32c": crc32c}
        shape = config.model.in_channels, *config.clip.size
        write_whole(onnx, onnx_bytes(models, shape, sealed, target_of(config.target)))
    card = card_of_run(
        run,
        config,
        record,
        facts,
        out,
        calibration=calibration,
        snapshots=[source.path.stem for source in sources] if is_whole else None,
        parameters=sum(parameter.numel() for parameter in models[0].parameters()),
        crc32c=crc32c,
        store_path=store_path,
    )
    write_card(card, out)
    return facts


def _find_weights(run: Path, step: int | None) -> list[_Source]:
    """All snapshots, oldest first, or the one snapshot or checkpoint to export."""
    snapshots = dict(by_step(run / SNAPSHOTS, SNAPSHOT))
    checkpoints = dict(by_step(run / CHECKPOINTS))
    if step is None and snapshots:
        return [_Source(at, path, "snapshot") for at, path in snapshots.items()]
    if step in snapshots:
        return [_Source(step, snapshots[step], "snapshot")]
    newest = latest_valid(run / CHECKPOINTS) if step is None else None
    for at, path in checkpoints.items():
        if at == step or path == newest:
            return [_Source(at, path, "checkpoint")]
    there = ", ".join(map(str, sorted(snapshots.keys() | checkpoints.keys())))
    raise RunError(
        "the run has no weights yet" if step is None else f"the run has no weights of step {step}",
        where=run,
        fix=f"There are those of {there}."
        if there
        else "Let 'dist-train train' reach a snapshot or a checkpoint.",
    )


def _load(
    run: Path, config: Config, record: dict[str, Any], source: _Source, store_path: Location | None
) -> nn.Module:
    """The model with the weights of a source, in eval mode."""
    # Without ``model.stem_folded``, which the ONNX exporter cannot trace for any depth.
    model = model_of(model_metadata(config))
    if source.kind == "snapshot":
        load_into(model, source.path, config, record)
        return model.eval()
    tensors, _ = load_checkpoint(source.path)
    try:
        weights = evaluated_weights(tensors, model.state_dict())
        check_finite(weights)
    except (ValueError, KeyError) as error:
        raise RunError(f"the weights do not fit the run ({error})", where=source.path) from None
    fit_weights(model, weights, source.path)
    if config.norm.precise_steps and not any(name.startswith(EVALUATED) for name in tensors):
        # Within an epoch a checkpoint holds only running statistics, which lag behind the weights.
        try:
            data = open_run_data(run, config, store_path=store_path)
        except DistTrainError as error:
            raise RunError(
                "the checkpoint was saved within an epoch, so its BatchNorm statistics have to be "
                f"computed from the store, which cannot be opened ({error})",
                where=f"{run}, step {source.step}",
                fix="Bring the store back, or export a checkpoint of the end of an epoch.",
            ) from None
        statistics_of_run(
            model,
            data,
            source.step,
            steps=config.norm.precise_steps,
            processes=int(record["sessions"][-1]["world_size"]),
            device=torch.device("cpu"),
        )
    return model.eval()


def _calibration(
    run: Path, config: Config, sources: Sequence[_Source]
) -> tuple[AnyCalibration | None, float | dict[str, float] | None]:
    """The calibration of the run's predictions, and the threshold, or thresholds of labels, of the
    best MCC on val; nothing of regression."""
    calibration = None
    if config.target.kind == "regression":
        return None, None
    if os.path.lexists(run / PREDICTIONS):
        predictions = read_predictions(run / PREDICTIONS)
        calibration = read_calibration(run / PREDICTIONS, predictions)
    if calibration is None:
        if config.split.train_on_all:
            reason = "holds out no clips (split.train_on_all)"
            advice = "calibrate it on other clips, predicted by 'dist-train predict --store'"
        else:
            reason, advice = "has no predictions", "run 'dist-train predict' before"
        log.warning(
            "%s %s, so the file has no calibration and no threshold: %s", run, reason, advice
        )
        return None, None
    if list(calibration.snapshots) != [source.path.name for source in sources]:
        raise RunError(
            "the run's predictions are of other snapshots than it has now",
            where=run,
            fix="Run 'dist-train predict' again, or name one by --step.",
        )
    check_origin(run)
    origin = read_origin(run / PREDICTIONS)
    if origin is not None and origin.tta is not None:
        raise RunError(
            f"the run's predictions are with --tta {origin.tta}, and an export predicts without it",
            where=run,
            fix="Run 'dist-train predict' without it before.",
        )
    val = val_clips(predictions)
    if isinstance(calibration, Calibration):
        return calibration, val_threshold(calibration, val.probability, val.truth)
    return calibration, label_thresholds(val) or None
