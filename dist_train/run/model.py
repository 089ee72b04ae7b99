"""The model of a run, what identifies it, and its logits of held-out clips."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
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
from dist_train.extensions import is_import_path
from dist_train.models.norm import BatchNorm3d, fuse
from dist_train.models.registry import build_model, defaults_of, find_model
from dist_train.targets import CODED, Target

log = logging.getLogger(__name__)

#: Settings of ``model`` that are arguments of resnet3d; other models take ``model.args``.
OF_RESNET3D = ("width", "stem_stride", "stem_pool", "stem_folded", "dropout")
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
    """The config's model in its memory layout, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    model = configured_model(config.model)
    if config.norm.fused:
        fuse(model)
    layout = _layout(config)
    for tensor in (*model.parameters(), *model.buffers()):
        # A model from outside may have kernels in 2D, which have no layout of 3D.
        if tensor.ndim == 5:
            tensor.data = tensor.data.to(memory_format=layout)
    return model


def configured_model(settings: ModelSettings) -> nn.Module:
    """The model that the settings name, with its own settings alone.

    Raises:
        ModelError: there is no such model, or it has no such setting.
        ConfigError: an import path is not allowed or not importable.
    """
    name, args = settings.name, settings.args
    own = settings.model_dump(include=set(OF_RESNET3D))
    channels, outputs = settings.in_channels, settings.outputs
    if _is_resnet3d(name):
        if args:
            raise ModelError(
                f"{name} takes no model.args",
                where=f"model.args.{next(iter(args))}",
                fix=f"Its settings are {', '.join(f'model.{setting}' for setting in own)}.",
            )
        own |= {"in_channels": channels, "outputs": outputs, "recompute": settings.recompute}
        return build_model(name, **own)
    parameters = signature(find_model(name)).parameters
    takes_channels, takes_outputs = "in_channels" in parameters, "outputs" in parameters
    if not takes_outputs and outputs != 1:
        raise ModelError(
            f"{name} does not say that it gives {outputs} numbers for a clip, as the target needs",
            where="model.name",
            fix="Let its constructor take outputs.",
        )
    if args.get("outputs", outputs) != outputs:
        raise ModelError(
            f"{name} gives {args['outputs']} numbers for a clip, and the target needs {outputs}",
            where="model.args.outputs",
            fix="Leave it out of model.args.",
        )
    given = args.get("in_channels", channels if takes_channels else 1)
    if given != channels:
        raise ModelError(
            f"{name} takes clips of {given} channels, and the store's have {channels}"
            if takes_channels
            else f"{name} does not say that it takes clips of {channels} channels",
            where="model.name",
            fix="Let its constructor take in_channels, and leave it out of model.args.",
        )
    standard = ModelSettings()
    for setting in (*own, "recompute"):
        if getattr(settings, setting) != getattr(standard, setting):
            raise ModelError(
                f"{name} has no such setting",
                where=f"model.{setting}",
                fix="It is of resnet3d; give a model's own by model.args.",
            )
    sizes = {"in_channels": channels} if takes_channels else {}
    sizes |= {"outputs": outputs} if takes_outputs else {}
    model = build_model(name, **sizes | args)
    _warn_of_plain_norms(name, model)
    return model


def _is_resnet3d(name: str) -> bool:
    return name.startswith("resnet3d-") and not is_import_path(name)


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
    keys = set(OF_RESNET3D) - {"stem_folded"} if _is_resnet3d(settings.name) else {"args"}
    if settings.channels is not None:
        # Absent for grey, as in files of earlier versions.
        keys |= {"channels"}
    if settings.outputs != 1:
        keys |= {"outputs"}
    metadata: dict[str, Any] = settings.model_dump(mode="json", include={"name"} | keys)
    return metadata


def target_metadata(config: Config) -> dict[str, Any]:
    """What the model's outputs mean, as JSON types; empty for the two classes of a store."""
    target = config.target
    return target.model_dump(mode="json") if target != TargetSettings() else {}


def target_of(settings: TargetSettings) -> Target:
    """What a run with these settings predicts. Training writes them with their kind and classes."""
    if settings == TargetSettings():
        return Target()
    kind = settings.kind
    assert kind != "auto"
    names = settings.classes if kind in CODED else settings.columns or ("label",)
    assert names is not None
    return Target(kind, names, settings.center or (), settings.scale or ())


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
    if _is_resnet3d(name):
        keys = set(OF_RESNET3D) - {"stem_folded"}
        return ModelSettings().model_dump(mode="json", include=keys)
    # In JSON a tuple is a list.
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in defaults_of(name).items()}
    return {f"args.{n}": value for n, value in plain.items()}
