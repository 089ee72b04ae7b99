"""The weights that a new run begins with, where ``model.init`` names some."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.checkpoint.format import MARKER, by_step, latest_valid, load_checkpoint
from dist_train.config import Config
from dist_train.errors import ConfigError, RunError
from dist_train.files import reason_of
from dist_train.run.folder import CHECKPOINTS, SNAPSHOT, SNAPSHOTS
from dist_train.run.model import make_model, metadata_differences, model_metadata
from dist_train.run.snapshots import load_snapshot
from dist_train.training.run_state import judged_weights

SETTING = "model.init"


class Source(NamedTuple):
    """Where weights were read, for the run's record.

    Attributes:
        path: absolute.
        step: of the run that they are from.
        sha256: over names and values of all weights and statistics, hex.
    """

    path: str
    step: int
    sha256: str


def initial_model(config: Config) -> tuple[nn.Module, Source | None]:
    """A new run's model on the host: weights by the seed, or those that ``model.init`` names, and
    then where they are from.

    Raises:
        ConfigError: there are no such weights, or they are of another model.
        CheckpointError: the checkpoint is damaged.
    """
    model = make_model(config)
    if config.model.init is None:
        return model, None
    path = _find(config.model.init)
    weights, facts, step = _read(path, list(model.state_dict()))
    _check_facts(path, facts, model_metadata(config))
    _check_weights(path, weights, model.state_dict())
    model.load_state_dict(weights)
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return model, Source(str(path.resolve()), step, digest.hexdigest())


def _find(path: Path) -> Path:
    """A safetensors file, or the folder of a checkpoint."""
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
    """Weights by name, what the model must agree with, and the step that they are of."""
    if path.is_dir():
        tensors, marker = load_checkpoint(path)
        kept = {name for name in tensors if name.startswith("model/")}
        own = judged_weights(tensors, names) if {f"model/{name}" for name in names} <= kept else {}
        extra = {name.removeprefix("model/"): tensors[name] for name in kept}
        return extra | own, marker["facts"]["model"], int(marker["step"])
    try:
        weights, facts = load_snapshot(path)
        model, step = facts["model"], int(facts["step"])
        if not isinstance(model, dict):
            raise TypeError("its model is no list of settings")
    except (RunError, ValueError, KeyError, TypeError) as error:
        raise _refused(
            path,
            f"it is no snapshot or export of dist-train, or is damaged ({reason_of(error)})",
            "Make one by 'dist-train export'.",
        ) from None
    if len(facts.get("networks", [""])) > 1:
        raise _refused(
            path,
            f"it holds {len(facts['networks'])} networks",
            "Export one of them by 'dist-train export --step', or name a snapshot.",
        )
    return weights, model, step


def _check_facts(path: Path, there: Mapping[str, Any], here: dict[str, Any]) -> None:
    apart = [
        f"model.{name} is {was} there and {now} here"
        for name, was, now in metadata_differences(there, here)
    ]
    if apart:
        raise _refused(
            path,
            f"the weights are of another model ({'; '.join(apart)})",
            "Use the same model settings, or other weights.",
        )


def _check_weights(path: Path, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    def named(names: set[str]) -> str:
        return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))

    missing, extra = own.keys() - given.keys(), given.keys() - own.keys()
    odd = {
        name
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape or given[name].dtype != own[name].dtype
    }
    for names, what in (
        (missing, "lack"),
        (extra, "have, unlike the model,"),
        (odd, "have in another shape or type"),
    ):
        if names:
            raise _refused(path, f"the weights {what} {named(names)}", "Use other weights.")
    wrong = {
        name
        for name, tensor in given.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    }
    if wrong:
        raise _refused(
            path, f"not all numbers of {named(wrong)} are finite", "Use an earlier snapshot."
        )


def _refused(path: Path, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{path}: {what}", where=SETTING, fix=fix)
