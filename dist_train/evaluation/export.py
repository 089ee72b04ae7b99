"""A run's model as one file: safetensors for PyTorch, ONNX for everything else."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.checkpoint.format import by_step, latest_valid, load_checkpoint
from dist_train.config import Config
from dist_train.errors import DistTrainError, RunError
from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.ensemble import MOST_TOLD
from dist_train.evaluation.evaluate import (
    CALIBRATION,
    calibration_of,
    read_predictions,
    val_clips,
    val_threshold,
)
from dist_train.evaluation.exported import Ensemble
from dist_train.evaluation.prediction_origin import check_origin
from dist_train.files import check_replaceable, reason_of, write_whole
from dist_train.models.resnet3d import BasicBlock, Bottleneck, ConvNorm, ResNet3D
from dist_train.run.data import open_run_data
from dist_train.run.folder import CHECKPOINTS, PREDICTIONS, SNAPSHOT, SNAPSHOTS, refuse_own_place
from dist_train.run.model import make_model
from dist_train.run.record import code_from_outside, open_record, open_run, warn_of_other_code
from dist_train.run.snapshots import (
    check_facts,
    check_finite,
    load_snapshot,
    save_snapshot,
    snapshot_facts,
    sum_of_weights,
)
from dist_train.system.advice import blame_machine
from dist_train.training.fresh_statistics import statistics_of_run
from dist_train.training.run_state import JUDGED, judged_weights

log = logging.getLogger(__name__)

NEEDED_FOR_ONNX = ("onnx", "onnxscript")
#: Of a protobuf message, and so of an ONNX file that holds its weights.
MOST_BYTES = 2**31


#: How a clip becomes the model's input; the same words in every file.
PREPROCESSING = {
    "channels": "one: grey, uint8, 0 black and 255 white; colour is converted when the store is "
    "made, and an outline is cropped to if the store was made so",
    "frames": "a clip of more than max_frames is cut to those in its middle, from frame "
    "(frames - max_frames) // 2 on",
    "resize": "each frame to size (height, width): area averaging along an axis that shrinks, then "
    "bilinear along one that grows (OpenCV), rounded to uint8",
    "scale": "divided by 255, to float32 of 0 to 1",
    "padding": "clips of a batch are padded with frames at their end, which change nothing",
}


def export_run(
    run: Path, out: Path, *, onnx: Path | None = None, step: int | None = None
) -> dict[str, Any]:
    """Write the model of a run, as ``predict`` uses it: all its snapshots in one file, whose
    probabilities are averaged; where it has none, its newest whole checkpoint.

    ``load_exported`` reads the safetensors file. The ONNX model takes ``volumes``, float32
    [B, 1, D, H, W] of 0 to 1, with the run's H and W, and ``frames``, int64 [B], the true depth of
    each clip, from 1 to D. It gives ``probability``, float32 [B], the mean over the snapshots, and
    ``logits``, float32 [B, snapshots]; B and D are free. As in PyTorch, what padded frames hold
    does not matter.

    Args:
        out: the safetensors file to write.
        onnx: the ONNX file to write, if any.
        step: take the snapshot, or else the checkpoint, of this step alone. Then the names of the
            tensors are those of the network, and there is no calibration.

    Returns:
        The facts that both files carry as JSON under "facts" in their metadata: what a snapshot
        says (``step``, the last, ``model``, ``clip``, ``store``, ``data``, and ``crc32c`` of the
        safetensors file), ``steps``, ``from`` ("snapshots", "snapshot" or "checkpoint"),
        ``networks`` (the prefix of each one's tensors), ``precision`` (in which ``predict``
        computes), ``preprocessing``, ``positive_rate`` (of the training batches, and natural),
        ``calibration`` (as calibration.json, with the prior; None if nothing was predicted) and
        ``threshold`` (of the calibrated probability).

    Raises:
        RunError: no run, no weights, weights that do not fit the run, no ONNX here, one name for
            both files, a name that the run uses itself, or predictions or a calibration of other
            snapshots.
        CheckpointError: the checkpoints that there are are damaged.
        FileError: ``out`` or ``onnx`` is there and is no plain file.
        OSError: a file cannot be written.
    """
    config = open_run(run)
    for path in filter(None, (out, onnx)):
        check_replaceable(path)
        refuse_own_place(run, path)
    if onnx is not None:
        _need_onnx()
        if onnx.resolve() == out.resolve():
            raise RunError(
                "the safetensors and the ONNX file have the same name",
                where=out,
                fix="Give --out and --onnx different ones.",
            )
    found = _find(run, step)
    record = open_record(run)
    warn_of_other_code(run, config, record)
    loaded = [_load(run, config, record, path, origin) for path, origin in found]
    models = [model for model, _ in loaded]
    steps = [at for _, at in loaded]
    many = len(models) > 1
    prefixes = [f"step-{at}/" for at in steps] if many else [""]
    calibration, threshold = None, None
    if step is None and found[0][1] == "snapshot":
        calibration, threshold = _calibration(run, found)
    content = record["store"]["content"] if "store" in record else None
    facts = (
        snapshot_facts(config, steps[-1], content)
        | {
            "steps": steps,
            "from": "snapshots" if many else found[0][1],
            "networks": prefixes,
            "precision": config.train.precision,
            "preprocessing": PREPROCESSING,
            "positive_rate": record.get("positive_rate"),
            "calibration": None if calibration is None else calibration.model_dump(mode="json"),
            "threshold": threshold,
        }
        | ({"code_from_outside": code} if (code := code_from_outside(config)) else {})
    )
    for path in filter(None, (out, onnx)):
        path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {
        prefix + name: tensor.contiguous()
        for prefix, model in zip(prefixes, models, strict=True)
        for name, tensor in model.state_dict().items()
    }
    save_snapshot(out, contiguous, facts)
    if onnx is not None:
        sealed = facts | {"crc32c": sum_of_weights(contiguous, facts)}
        write_whole(onnx, onnx_bytes(models, config.clip.size, sealed))
    return facts


def _calibration(
    run: Path, found: Sequence[tuple[Path, str]]
) -> tuple[Calibration | None, float | None]:
    """What the run's predictions were calibrated by, and the threshold of its best MCC on val."""
    calibration, val = None, None
    if os.path.lexists(run / PREDICTIONS):
        predictions = read_predictions(run / PREDICTIONS)
        calibration, val = calibration_of(predictions, run / CALIBRATION), val_clips(predictions)
    if calibration is None or val is None:
        log.warning(
            "%s has no predictions, so the file has no calibration and no threshold: run "
            "'dist-train predict' before",
            run,
        )
        return None, None
    if list(calibration.snapshots) != [path.name for path, _ in found]:
        raise RunError(
            "the run's predictions are of other snapshots than it has now",
            where=run,
            fix="Run 'dist-train predict' again, or name one by --step.",
        )
    check_origin(run)
    return calibration, val_threshold(calibration, *val)


class PaddedInference(nn.Module):
    """A ``ResNet3D`` in eval mode as a graph without branches, for any depths in a batch.

    ``ResNet3D`` gathers real frames, whose number depends on the data. In eval mode normalisation
    needs no gathering: padded frames are normalised like the others, then set to zero.
    """

    def __init__(self, model: ResNet3D) -> None:
        super().__init__()
        self.model = model

    def forward(self, volumes: Tensor, frames: Tensor) -> Tensor:
        """Logits [B] of float32 [B, 1, D, H, W] with ``frames``, int64 [B], real frames each."""
        depth = torch.arange(volumes.shape[2], device=volumes.device)
        real = (depth < frames[:, None])[:, None, :, None, None]
        x, real = _conv_norm(self.model.stem, _clear(volumes, real), real)
        x = F.relu(x)
        pool = self.model.pool
        if pool is not None:
            real = real[:, :, ::2]
            x = _clear(F.max_pool3d(x, pool.kernel_size, pool.stride, pool.padding), real)
        for block in self.model.blocks:
            assert isinstance(block, BasicBlock | Bottleneck)
            x, real = _block(block, x, real)
        features = x.mean(dim=(3, 4)).sum(dim=2) / real.sum(dim=(2, 3, 4))
        logits: Tensor = self.model.head(features)
        return logits.squeeze(1)


def _block(block: BasicBlock | Bottleneck, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    shortcut = x if block.shortcut is None else _conv_norm(block.shortcut, x, real)[0]
    x, real = _conv_norm(block.conv1, x, real)
    x, real = _conv_norm(block.conv2, F.relu(x), real)
    if isinstance(block, Bottleneck):
        x, real = _conv_norm(block.conv3, F.relu(x), real)
    return F.relu(x + shortcut), real


def _conv_norm(part: ConvNorm, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, D, H, W] with its real frames, bool [B, 1, D, 1, 1], and both behind the layer."""
    conv, norm = part.conv, part.norm
    real = real[:, :, :: conv.stride[0]]
    x = F.conv3d(x, conv.weight, None, conv.stride, conv.padding)
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return _clear(x, real), real


def _clear(x: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, x, 0.0)


def onnx_bytes(models: Sequence[nn.Module], size: tuple[int, int], facts: dict[str, Any]) -> bytes:
    """Models, whose probabilities are averaged, as the content of an ONNX file; ``size`` is H and W
    of their clips.

    Raises:
        RunError: a model has no ONNX form, or they are too large for it.
    """
    parts = []
    for model in models:
        if not isinstance(model, ResNet3D):
            raise RunError(
                f"{type(model).__name__} cannot be written as ONNX", fix="Leave out --onnx."
            )
        parts.append(PaddedInference(model))
    if sum(t.nbytes for model in models for t in model.state_dict().values()) >= MOST_BYTES:
        raise RunError(
            "the model is larger than the 2 GiB of an ONNX file",
            fix="Leave out --onnx, or take one snapshot of several by --step.",
        )
    # So deep that no axis has length 1 anywhere: the exporter would take that for a constant.
    depth = 32 * parts[0].model.stem_frame_stride + 1
    example = torch.zeros(2, 1, depth, *size), torch.full((2,), depth)
    with _quiet_exporter():
        program = torch.onnx.export(
            Ensemble(parts).eval(),
            example,
            input_names=["volumes", "frames"],
            output_names=["probability", "logits"],
            dynamic_shapes={"volumes": {0: "batch", 2: "depth"}, "frames": {0: "batch"}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    content = program.model_proto
    content.metadata_props.add(key="facts", value=json.dumps(facts))
    serialized: bytes = content.SerializeToString()
    return serialized


def _load(
    run: Path, config: Config, record: dict[str, Any], path: Path, origin: str
) -> tuple[nn.Module, int]:
    """The model with the weights of a snapshot or checkpoint, and their step."""
    model = make_model(config)
    try:
        if origin == "snapshot":
            weights, known, _ = load_snapshot(path)
            check_facts(path, known, config, record)
        else:
            tensors, _ = load_checkpoint(path)
            weights = judged_weights(tensors, model.state_dict())
            check_finite(weights)
        model.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        blame_machine(error, path)
        reason = reason_of(error)[:MOST_TOLD]
        raise RunError(f"the {origin} does not fit the run ({reason})", where=path) from None
    found = int(path.name.removeprefix("step-").removesuffix(SNAPSHOT))
    if origin == "checkpoint" and not any(name.startswith(JUDGED) for name in tensors):
        _renew_statistics(run, config, record, model, found)
    return model.eval(), found


def _renew_statistics(
    run: Path, config: Config, record: dict[str, Any], model: nn.Module, done: int
) -> None:
    """Those of a checkpoint that was not judged are the running ones, which lag behind."""
    if not config.norm.precise_steps:
        return
    try:
        data = open_run_data(run, config)
    except DistTrainError as error:
        raise RunError(
            "the checkpoint was saved within an epoch, so its BatchNorm statistics have to be "
            f"taken anew, and the store cannot be opened ({error})",
            where=f"{run}, step {done}",
            fix="Bring the store back, or export a checkpoint of the end of an epoch.",
        ) from None
    statistics_of_run(
        model,
        data,
        done,
        steps=config.norm.precise_steps,
        processes=int(record["sessions"][-1]["world_size"]),
        device=torch.device("cpu"),
    )


def _find(run: Path, step: int | None) -> list[tuple[Path, str]]:
    """Where weights are, oldest first, and whether that is a snapshot or a checkpoint."""
    snapshots = dict(by_step(run / SNAPSHOTS, SNAPSHOT))
    checkpoints = dict(by_step(run / CHECKPOINTS))
    if step is None and snapshots:
        return [(snapshots[at], "snapshot") for at in sorted(snapshots)]
    if step in snapshots:
        return [(snapshots[step], "snapshot")]
    path = latest_valid(run / CHECKPOINTS) if step is None else checkpoints.get(step)
    if path is not None:
        return [(path, "checkpoint")]
    there = ", ".join(map(str, sorted(snapshots.keys() | checkpoints.keys())))
    raise RunError(
        "the run has no weights yet" if step is None else f"the run has no weights of step {step}",
        where=run,
        fix=f"There are those of {there}."
        if there
        else "Let 'dist-train train' reach a snapshot or a checkpoint.",
    )


def _need_onnx() -> None:
    missing = [name for name in NEEDED_FOR_ONNX if find_spec(name) is None]
    if missing:
        raise RunError(
            f"ONNX needs {' and '.join(missing)}",
            fix="Run pip install 'dist_train[export]', or leave out --onnx.",
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """What PyTorch's exporter says of its own insides and of packages that this needs not."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
