"""The optimizer's groups of parameters: those with equal weight decay and learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_train.config import FinetuneSettings, OptimSettings
from dist_train.distributed.backends.base import LR_SCALE
from dist_train.models.parts import head_of, parts_of


def parameter_groups(
    model: nn.Module, optim: OptimSettings, finetune: FinetuneSettings
) -> list[dict[str, Any]]:
    """Return the groups of the parameters that are trained; none is empty.

    Biases and BatchNorm's scales, which have one axis, are only decayed if ``optim.decay`` is
    "all": they do not limit the model's capacity, and decay only shrinks the signal.

    A group's ``LR_SCALE`` is the factor of its learning rate. That of the k-th part before the head
    is ``layer_decay ** k`` (Howard & Ruder 2018, "discriminative fine-tuning"; Bao et al. 2022).

    Raises:
        ModelError: rates differ by part, and the model has no head.
    """
    of_vectors = optim.weight_decay if optim.decay == "all" else 0.0
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    scales = _scales(model, optim, finetune)
    # Matrices first, and within them the parts from the input on.
    for is_vector in (False, True):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or (parameter.ndim <= 1) != is_vector:
                continue
            scale = scales.get(name, 1.0)
            decay = of_vectors if is_vector else optim.weight_decay
            empty = {"params": [], "weight_decay": decay, LR_SCALE: scale}
            groups.setdefault((scale, is_vector), empty)["params"].append(parameter)
    return list(groups.values())


def _scales(model: nn.Module, optim: OptimSettings, finetune: FinetuneSettings) -> dict[str, float]:
    """Factor of the learning rate by parameter; of those that are not named it is 1."""
    if finetune.layer_decay == 1.0 and finetune.head_lr is None:
        return {}
    head, parts = head_of(model), parts_of(model)
    body = [part for part in parts if part != head]
    scales = {part: finetune.layer_decay ** (len(body) - k) for k, part in enumerate(body)}
    scales[head] = 1.0 if finetune.head_lr is None else finetune.head_lr / optim.lr
    return {name: scales[part] for part, names in parts.items() for name in names}
