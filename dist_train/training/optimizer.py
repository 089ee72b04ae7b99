"""The optimizer: AdamW, SGD with Nesterov momentum, or LAMB."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_train.config import OptimSettings
from dist_train.training.lamb import Lamb


def make_optimizer(
    model: nn.Module,
    settings: OptimSettings,
    all_reduce: Callable[[Tensor], None] = lambda tensor: None,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019), SGD (Sutskever et al. 2013) or LAMB (You et al.
    2020).

    Biases and BatchNorm's scales, which have one axis, are only decayed if ``settings.decay`` is
    "all": they do not limit the model's capacity, and decay only shrinks the signal.

    Args:
        all_reduce: sums a tensor over the ranks in place, for the norms of sharded tensors.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    of_vectors = settings.weight_decay if settings.decay == "all" else 0.0
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": of_vectors},
    ]
    fused = True if settings.fused else None
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=True, fused=fused
        )
    if settings.name == "lamb":
        groups[1]["trust"] = settings.decay == "all"
        return Lamb(groups, lr=settings.lr, betas=settings.betas, all_reduce=all_reduce)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)
