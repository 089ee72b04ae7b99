"""Logits of held-out clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.data.augment.gpu import augmented_batch
from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.loading.collate import Batch
from dist_train.models.norm import fuse
from dist_train.models.registry import build_model


@torch.no_grad()
def held_out_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    device: torch.device,
    done: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Clip numbers int64 [N] and logits float32 [N], in the order of the batches.

    The model is put in eval mode, and back into the mode it was in. ``done`` is called with the
    number of clips of each finished batch.
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
    settings = config.model.model_dump(exclude={"name", "init", "activation_memory"})
    model = build_model(config.model.name, **settings)
    if config.norm.fused:
        fuse(model)
    # The stubs of nn.Module.to lack memory_format on its own.
    return model.to(memory_format=_layout(config))  # type: ignore[call-overload, no-any-return]


def as_input(volumes: Tensor | NativeClips, config: Config) -> Tensor:
    """uint8 [B, 1, D, H, W], or clips of their own sizes, to float32 [B, 1, D, H, W] of 0 to 1 in
    the run's memory layout, on the same device."""
    if isinstance(volumes, NativeClips):
        return augmented_batch(volumes, config.clip.size).to(memory_format=_layout(config))
    return volumes.to(memory_format=_layout(config)).float().div_(255)


def _layout(config: Config) -> torch.memory_format:
    return torch.channels_last_3d if config.train.channels_last else torch.contiguous_format


def model_metadata(config: Config) -> dict[str, Any]:
    """What a checkpoint must agree with for its weights to mean the same: JSON types."""
    only_how = {"init", "recompute", "activation_memory", "stem_folded"}
    facts: dict[str, Any] = config.model.model_dump(mode="json", exclude=only_how)
    return facts
