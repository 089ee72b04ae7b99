"""A trained net whose probabilities are further labels (Hinton, Vinyals and Dean, "Distilling the
knowledge in a neural network", 2015)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from dist_train.checkpoint.format import by_step
from dist_train.config import Config, ModelSettings, TargetSettings
from dist_train.data.types import GREY
from dist_train.distributed.backends.base import autocast
from dist_train.errors import ConfigError, DistTrainError
from dist_train.files import reason_of
from dist_train.run.folder import SNAPSHOT, SNAPSHOTS
from dist_train.run.model import model_of, target_of
from dist_train.run.snapshots import load_snapshot
from dist_train.targets import Kind, Target

log = logging.getLogger(__name__)

SETTING = "loss.distill.teacher"


class Origin(NamedTuple):
    """Where a teacher was read, for the run's record.

    Attributes:
        path: absolute path.
        networks: number of nets.
        sha256: hex digest of names and values of all weights.
    """

    path: str
    networks: int
    sha256: str


class Teacher:
    """The mean of the probabilities of some nets, in eval mode and without gradients.

    It is a plain module of each process, outside of the backend, so it is whole on every rank.

    Attributes:
        origin: where it was read.
        settings: the form of each net.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        settings: Sequence[ModelSettings],
        origin: Origin,
        config: Config,
        kind: Kind,
    ) -> None:
        self._models, self._kind = nn.ModuleList(models).eval().requires_grad_(False), kind
        self._temperature = config.loss.distill.temperature
        self._precision = config.train.precision
        self.settings, self.origin = settings, origin

    def to(self, device: torch.device) -> Teacher:
        self._models.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """Scores (``label_forms``) at the temperature, float32, of [B, C, D, H, W] of 0 to 1 with
        the true depths int64 [B]."""
        with autocast(self._precision, x.device):
            outputs = [model(x, frames) for model in self._models]
        return softened(torch.stack(outputs).float(), self._kind, self._temperature)


def softened(logits: Tensor, kind: Kind, temperature: float) -> Tensor:
    """The mean probability of nets, whose log is divided by the temperature: float32 [B] or
    [B, outputs], of logits with a first axis of nets."""
    many = math.log(len(logits))
    if kind == "multiclass":
        mean = log_softmax(logits, dim=2).logsumexp(0) - many
        return torch.softmax(mean / temperature, dim=1)
    yes, no = (logsigmoid(sign * logits).logsumexp(0) for sign in (1, -1))
    return torch.sigmoid((yes - no) / temperature)


def load_teacher(config: Config, target: Target, device: torch.device) -> Teacher | None:
    """Read the teacher of ``loss.distill`` to a device; None without one.

    Raises:
        ConfigError: it cannot be read, or takes or gives something else than the run's model.
    """
    path = config.loss.distill.teacher
    if path is None:
        return None
    steps = [file for _, file in by_step(path / SNAPSHOTS, SNAPSHOT)] if path.is_dir() else [path]
    if not steps:
        raise _refused(path, "there are no snapshots here", "Give a run's folder, or an export.")
    digest = hashlib.sha256()
    models: list[nn.Module] = []
    settings: list[ModelSettings] = []
    for file in steps:
        try:
            weights, facts = load_snapshot(file)
            _check_fits(path, facts["model"], facts["clip"], config, target)
            _check_target(path, facts.get("target", {}), target)
            for prefix in facts.get("networks", [""]):
                models.append(_network(facts["model"], weights, prefix, config))
                settings.append(ModelSettings.model_validate(facts["model"]))
        except (DistTrainError, RuntimeError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise _refused(
                path,
                f"it is no run, snapshot or export of dist-train ({reason_of(error)})",
                "Make one by 'dist-train export'.",
            ) from None
        for name in sorted(weights):
            digest.update(name.encode())
            digest.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    origin = Origin(str(path.resolve()), len(models), digest.hexdigest())
    return Teacher(models, settings, origin, config, target.kind).to(device)


def _network(
    model: dict[str, Any], weights: dict[str, Tensor], prefix: str, config: Config
) -> nn.Module:
    network = model_of(model)
    network.load_state_dict(
        {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    )
    if config.train.channels_last:
        for tensor in network.parameters():
            if tensor.ndim == 5:
                tensor.data = tensor.data.to(memory_format=torch.channels_last_3d)
    return network


def _check_target(path: Path, settings: dict[str, Any], target: Target) -> None:
    """Refuse a teacher of another kind of target, or of other classes. That of the two classes of a
    store does not say their names."""
    theirs = target_of(TargetSettings.model_validate_json(json.dumps(settings)))
    if theirs.kind != target.kind or (settings and theirs.classes != target.classes):
        raise _refused(
            path,
            f"its target is {theirs.kind} ({', '.join(theirs.classes)}), and this one is "
            f"{target.kind} ({', '.join(target.classes)})",
            "Use a teacher of the same target.",
        )


def _check_fits(
    path: Path, model: dict[str, Any], clip: dict[str, Any], config: Config, target: Target
) -> None:
    there, here = tuple(model.get("channels") or GREY), config.model.channels or GREY
    if there != here:
        raise _refused(
            path,
            f"its channels are {', '.join(there)}, and the store's are {', '.join(here)}",
            "Use a teacher of the same channels.",
        )
    outputs = model.get("outputs", 1)
    if outputs != target.outputs:
        raise _refused(
            path,
            f"it has {outputs} outputs, and the target needs {target.outputs}",
            "Use a teacher of the same classes.",
        )
    size = tuple(clip["size"])
    if size != config.clip.size and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s was trained on frames of %dx%d, and is asked about frames of %dx%d",
            path, *size, *config.clip.size,
        )  # fmt: skip


def _refused(path: Path, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{path}: {what}", where=SETTING, fix=fix)
