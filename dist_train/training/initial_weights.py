"""The weights that a new run begins with: random ones, or those that ``model.init`` names."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_train.checkpoint.format import MARKER, by_step, latest_valid, load_checkpoint
from dist_train.config import Config
from dist_train.data.types import GREY
from dist_train.errors import ConfigError, ModelError, RunError
from dist_train.files import reason_of
from dist_train.models.layouts import AUTO, plain, transferred
from dist_train.models.transfer import Row, Transfer
from dist_train.run.folder import CHECKPOINTS, SNAPSHOT, SNAPSHOTS
from dist_train.run.model import make_model, model_metadata
from dist_train.run.snapshots import check_finite, load_snapshot
from dist_train.training.run_state import evaluated_weights, model_changes
from dist_train.training.weights_file import read_weights
from dist_train.training.weights_table import Source, grouped

SETTING = "model.init"
#: Names of layouts: a run or export of the same model; weights of the model but for its head.
OWN, PLAIN = "dist_train", "plain"
#: Settings of a model that weights of layout ``PLAIN`` may have otherwise.
MAY_DIFFER = ("channels", "outputs", "dropout")


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
    if path.is_dir() or _is_own(path):
        found = _from_own(path, config, model)
    else:
        found = _from_elsewhere(path, config, model)
    digest = hashlib.sha256()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].view(-1).view(torch.uint8).numpy().data)
    step, layout, rows, notes = found
    account = [group._asdict() for group in grouped(rows)]
    return model, Source(str(path.resolve()), step, digest.hexdigest(), layout, account, notes)


#: Step of the run, layout, what became of the tensors, and how the networks differ.
_Found = tuple[int | None, str, list[Row], list[str]]


def _from_own(path: Path, config: Config, model: nn.Module) -> _Found:
    """Load the weights of a run or export: of the same model, or, with ``model.init_layout:
    plain``, of one with another head or other channels."""
    weights, metadata, step = _read(path, list(model.state_dict()))
    layout = config.model.init_layout
    if layout not in (AUTO, PLAIN):
        raise _refused(
            path, f"it is of dist-train, and no file of {layout}", "Leave out model.init_layout."
        )
    ignored = MAY_DIFFER if layout == PLAIN else ()
    here = {k: v for k, v in model_metadata(config).items() if k not in ignored}
    if changes := model_changes({k: v for k, v in metadata.items() if k not in ignored}, here):
        raise _refused(
            path,
            f"the weights are of another model ({changes})",
            f"Use the same model settings, or other weights; model.init_layout={PLAIN} takes those "
            "of another head or of other channels.",
        )
    if layout == AUTO:
        _load(path, weights, model)
        rows = [Row("taken", name, tensor.numel()) for name, tensor in weights.items()]
        return step, OWN, rows, []
    there = tuple(metadata.get("channels") or GREY)
    with _refusals(path):
        move = Transfer(weights, model, config.model.channels or GREY)
        plain.move_known(move, there)
    model.load_state_dict(move.state)
    return step, PLAIN, move.rows, move.notes


def _from_elsewhere(path: Path, config: Config, model: nn.Module) -> _Found:
    """Load the weights of another library's file."""
    with _refusals(path):
        given, channels = read_weights(path), config.model.channels or GREY
        layout, move = transferred(given, model, channels, config.model.init_layout)
    model.load_state_dict(move.state)
    return None, layout, move.rows, move.notes


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn errors of reading and moving into those of the setting; one of the layout's name stays
    as it is."""
    try:
        yield
    except (ModelError, RunError) as error:
        if error.where not in (None, path):
            raise ConfigError(error.what, where=error.where, fix=error.fix) from None
        raise _refused(path, error.what, error.fix or "Use other weights.") from None


def _is_own(path: Path) -> bool:
    """Whether a file says that it is a snapshot or an export. One that cannot be read is taken for
    one, and refused with the reason."""
    if path.suffix.lower() != SNAPSHOT:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "facts" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


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
