"""The optimizer: AdamW, SGD with Nesterov momentum, or LAMB."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_train.config import FinetuneSettings, OptimSettings
from dist_train.training.lamb import Lamb
from dist_train.training.parameter_groups import parameter_groups


def make_optimizer(
    model: nn.Module,
    settings: OptimSettings,
    finetune: FinetuneSettings | None = None,
    all_reduce: Callable[[Tensor], None] = lambda tensor: None,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019), SGD (Sutskever et al. 2013) or LAMB (You et al.
    2020) of ``parameter_groups``.

    Args:
        all_reduce: sums a tensor over the ranks in place, for the norms of sharded tensors.
    """
    groups = parameter_groups(model, settings, finetune or FinetuneSettings())
    fused = True if settings.fused else None
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=True, fused=fused
        )
    if settings.name == "lamb":
        for group in groups:
            group["trust"] = settings.decay == "all" or group["params"][0].ndim > 1
        return Lamb(groups, lr=settings.lr, betas=settings.betas, all_reduce=all_reduce)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)
