"""The model of a run, what identifies it, and its logits of held-out clips."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.config import Config, ModelSettings, TargetSettings
from dist_train.data.augment.gpu import augmented_batch
from dist_train.data.augment.levels import WHITE
from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.loading.collate import Batch
from dist_train.data.types import GREY
from dist_train.errors import ModelError
from dist_train.models.norm import BatchNorm3d, fuse
from dist_train.models.parts import freeze
from dist_train.models.registry import (
    MODELS,
    OF_RESNET3D,
    Ability,
    build_model,
    defaults_of,
    find_model,
    require,
)
from dist_train.models.trunk import Trunk

log = logging.getLogger(__name__)

#: Models with a warning already.
_warned: set[str] = set()


@torch.no_grad()
def held_out_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    device: torch.device,
    done: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Clip numbers int64 [N] and logits float32 [N] or [N, outputs], in the order of the batches.

    The model runs in eval mode, and is then put back into its former mode. ``done`` is called with
    the number of clips of each finished batch.
    """
    clips: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    logits: list[Tensor] = [torch.empty(0)]
    training = model.training
    model.eval()
    for batch in batches:
        moved = batch.to(device)
        logits.append(model(as_input(moved.volumes, config), moved.frames).float().cpu())
        clips.append(batch.clips)
        if done is not None:
            done(len(batch.clips))
    model.train(training)
    return torch.cat(clips).numpy(), torch.cat(logits).numpy()


def make_model(config: Config) -> nn.Module:
    """The config's model in its memory layout, with weights drawn from its seed, and its frozen
    parts frozen.

    Raises:
        ModelError, ConfigError: as ``configured_model`` and ``freeze``; or the model cannot do what
            the config asks of it.
    """
    _check_abilities(config)
    torch.manual_seed(config.seed)
    model = configured_model(config.model)
    freeze(model, config.finetune.freeze, config.finetune.freeze_norm)
    if config.norm.fused:
        fuse(model)
    layout = _layout(config)
    for tensor in (*model.parameters(), *model.buffers()):
        # A model from outside may have kernels in 2D, which have no layout of 3D.
        if tensor.ndim == 5:
            tensor.data = tensor.data.to(memory_format=layout)
    return model


def _check_abilities(config: Config) -> None:
    train = config.train
    asked: dict[Ability, tuple[str, bool]] = {
        "cuda_graphs": ("train.graphs", train.graphs),
        "sharded": ("train.backend", train.backend in ("zero3", "fsdp2")),
        "channels_last": ("train.channels_last", train.channels_last),
    }
    for ability, (setting, is_asked) in asked.items():
        if is_asked:
            require(config.model.name, ability, setting)


def configured_model(settings: ModelSettings) -> nn.Module:
    """The model that the settings name, with its own settings alone.

    Raises:
        ModelError: there is no such model, or it has no such setting, or cannot recompute.
        ConfigError: an import path is not allowed or not importable.
    """
    name, args, spec = settings.name, settings.args, find_model(settings.name)
    own = settings.model_dump(include=set(spec.settings))
    if own and args:
        raise ModelError(
            f"{name} takes no model.args",
            where=f"model.args.{next(iter(args))}",
            fix=f"Its settings are {', '.join(f'model.{setting}' for setting in own)}.",
        )
    standard = ModelSettings()
    for setting in OF_RESNET3D:
        if setting not in own and getattr(settings, setting) != getattr(standard, setting):
            raise ModelError(
                f"{name} has no such setting",
                where=f"model.{setting}",
                fix="It is of resnet3d; give a model's own by model.args.",
            )
    if settings.recompute != "none":
        require(name, "recompute", "model.recompute")
    if settings.activation_memory is not None:
        require(name, "recompute", "model.activation_memory")
    model = build_model(name, **_of_the_data(settings), **own, **args)
    if settings.recompute != "none":
        assert isinstance(model, Trunk)
        model.recompute = settings.recompute
    _warn_of_plain_norms(name, model)
    return model


def _of_the_data(settings: ModelSettings) -> dict[str, int]:
    """The arguments that a run takes from its clips and targets, and not from its user."""
    name, takes = settings.name, find_model(settings.name).arguments
    needed = {
        "in_channels": (settings.in_channels, "clips of {} channels, and the store's have {}"),
        "outputs": (settings.outputs, "{} outputs, and the target has {}"),
    }
    given: dict[str, int] = {}
    for argument, (number, text) in needed.items():
        there = settings.args.get(argument, number if argument in takes else 1)
        if there != number:
            raise ModelError(
                f"{name} takes {text.format(there, number)}"
                if argument in takes
                else f"{name} does not say that it takes {text.partition(',')[0].format(number)}",
                where="model.name",
                fix=f"Let its constructor take {argument}, and leave it out of model.args.",
            )
        if argument in takes and argument not in settings.args:
            given[argument] = number
    return given


def _warn_of_plain_norms(name: str, model: nn.Module) -> None:
    plain = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm3d)
    ]
    if plain and name not in _warned and os.environ.get("RANK", "0") == "0":
        _warned.add(name)
        log.warning(
            "%s has %d layers of torch's %s, whose statistics are over padded frames too, and over "
            "the clips of one process: use dist_train.models.norm.BatchNorm3d, which is told the "
            "real frames, or another normalisation",
            name, len(plain), type(plain[0]).__name__,
        )  # fmt: skip


def as_input(volumes: Tensor | NativeClips, config: Config) -> Tensor:
    """Scale [B, C, D, H, W], or clips of unequal sizes, to float32 [B, C, D, H, W] of 0 to 1 in the
    run's memory layout, on the same device."""
    if isinstance(volumes, NativeClips):
        return augmented_batch(volumes, config.clip.size).to(memory_format=_layout(config))
    return as_unit(volumes.to(memory_format=_layout(config)))


def as_unit(volumes: Tensor) -> Tensor:
    """Scale stored pixels to float32 of 0 to 1: uint8, uint16, or floats, which are so already."""
    white = WHITE[volumes.dtype]
    return volumes.float() if white == 1 else volumes.float().div_(white)


def _layout(config: Config) -> torch.memory_format:
    return torch.channels_last_3d if config.train.channels_last else torch.contiguous_format


def model_metadata(config: Config) -> dict[str, Any]:
    """Settings that give a checkpoint's weights their meaning, as JSON types."""
    settings = config.model
    keys = _own_settings(settings.name) or {"args"}
    # Absent where they have their default, as in files of earlier versions.
    if settings.channels is not None:
        keys |= {"channels"}
    if settings.outputs != 1:
        keys |= {"outputs"}
    if not settings.stem_border:
        keys -= {"stem_border"}
    metadata: dict[str, Any] = settings.model_dump(mode="json", include={"name"} | keys)
    return metadata


def target_metadata(config: Config) -> dict[str, Any]:
    """What the model's outputs mean, as JSON types; empty for the two classes of a store."""
    target = config.target
    return target.model_dump(mode="json") if target != TargetSettings() else {}


def _own_settings(name: str) -> set[str]:
    """The settings of a model that change what its weights mean. A model from outside has none, and
    is not imported for this."""
    return set(MODELS[name].settings) - {"stem_folded"} if name in MODELS else set()


def model_of(metadata: Mapping[str, Any]) -> nn.Module:
    """A model with fresh weights from the metadata of an export.

    Raises:
        ModelError, ConfigError: as ``configured_model``.
    """
    return configured_model(ModelSettings.model_validate(dict(metadata)))


def metadata_differences(there: Any, here: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings of ``model_metadata`` that differ: name, value there, value here.

    A setting that one side lacks has its default: it was added later, or was not given.
    """
    if not isinstance(there, dict):
        return [("", there, here)]
    before, now = _flat(there), _flat(here)
    # Only if needed, because a model from outside must be imported for its defaults.
    if before.keys() != now.keys() and before.get("name") == now["name"]:
        defaults = _defaults(now["name"])
        before, now = defaults | before, defaults | now
    return [
        (name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(metadata: dict[str, Any]) -> dict[str, Any]:
    args = metadata.get("args")
    if not isinstance(args, dict):
        return metadata
    given = {f"args.{name}": value for name, value in args.items()}
    return {name: value for name, value in metadata.items() if name != "args"} | given


def _defaults(name: str) -> dict[str, Any]:
    return {"channels": list(GREY), "outputs": 1} | _own_defaults(name)


def _own_defaults(name: str) -> dict[str, Any]:
    if keys := _own_settings(name):
        return ModelSettings().model_dump(mode="json", include=keys)
    # In JSON a tuple is a list.
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in defaults_of(name).items()}
    return {f"args.{n}": value for n, value in plain.items()}
