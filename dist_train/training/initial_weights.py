"""The weights that a new run begins with: random ones, or those that ``model.init`` names."""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.checkpoint.format import MARKER, by_step, latest_valid, load_checkpoint
from dist_train.config import Config
from dist_train.errors import ConfigError, RunError
from dist_train.files import reason_of
from dist_train.run.folder import CHECKPOINTS, SNAPSHOT, SNAPSHOTS
from dist_train.run.model import make_model, model_metadata
from dist_train.run.snapshots import check_finite, load_snapshot
from dist_train.training.run_state import evaluated_weights, model_changes

SETTING = "model.init"


class Source(NamedTuple):
    """Where weights were read, for the run's record.

    Attributes:
        path: absolute path.
        step: step of the run that they come from.
        sha256: hex digest of names and values of all weights and statistics.
    """

    path: str
    step: int
    sha256: str


def initial_model(config: Config) -> tuple[nn.Module, Source | None]:
    """Return a new run's model on the host, and the source of its weights; None if they are random.

    Raises:
        ConfigError: ``model.init`` has no weights, or weights of another model.
        CheckpointError: the checkpoint is damaged.
    """
    model = make_model(config)
    if config.model.init is None:
        return model, None
    path = _find(config.model.init)
    weights, metadata, step = _read(path, list(model.state_dict()))
    if changes := model_changes(metadata, model_metadata(config)):
        raise _refused(
            path,
            f"the weights are of another model ({changes})",
            "Use the same model settings, or other weights.",
        )
    _load(path, weights, model)
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return model, Source(str(path.resolve()), step, digest.hexdigest())


def _find(path: Path) -> Path:
    """Return a safetensors file, or the folder of a checkpoint."""
    if (path / MARKER).is_file() or path.is_file():
        return path
    snapshots = by_step(path / SNAPSHOTS, SNAPSHOT)
    found = snapshots[-1][1] if snapshots else latest_valid(path / CHECKPOINTS)
    if found is None:
        raise _refused(
            path,
            "there are no weights here",
            "Give a run's folder, one of its snapshots or checkpoints, or an export.",
        )
    return found


def _read(path: Path, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Return weights by name, the metadata of their model, and the step that they come from.
    ``names`` are those of the model that loads them."""
    if path.is_dir():
        tensors, marker = load_checkpoint(path)
        weights = {
            name.removeprefix("model/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("model/")
        }
        if set(names) <= weights.keys():
            weights |= evaluated_weights(tensors, names)
        try:
            check_finite(weights)
        except ValueError as error:
            raise _refused(path, str(error), "Use an earlier snapshot.") from None
        return weights, marker["facts"]["model"], int(marker["step"])
    try:
        weights, metadata = load_snapshot(path)
        model, step = metadata["model"], int(metadata["step"])
        if not isinstance(model, dict):
            raise TypeError("its model is no list of settings")
    except (RunError, ValueError, KeyError, TypeError) as error:
        raise _refused(
            path,
            f"it is no snapshot or export of dist-train, or is damaged ({reason_of(error)})",
            "Make one by 'dist-train export'.",
        ) from None
    networks = metadata.get("networks", [""])
    if len(networks) > 1:
        raise _refused(
            path,
            f"it holds {len(networks)} networks",
            "Export one of them by 'dist-train export --step', or name a snapshot.",
        )
    return weights, model, step


def _load(path: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    faults = {
        "lack": own.keys() - weights.keys(),
        "have, unlike the model,": weights.keys() - own.keys(),
        "have in another shape or type": {
            name
            for name in own.keys() & weights.keys()
            if (own[name].shape, own[name].dtype) != (weights[name].shape, weights[name].dtype)
        },
    }
    for what, names in faults.items():
        if names:
            shown = textwrap.shorten(", ".join(sorted(names)), 300)
            raise _refused(path, f"the weights {what} {shown}", "Use other weights.")
    model.load_state_dict(weights)


def _refused(path: Path, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{path}: {what}", where=SETTING, fix=fix)
