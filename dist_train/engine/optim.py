"""AdamW, with weight decay on weights only, unless it is asked for on all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.config import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019). Biases and BatchNorm's scales, which have one axis, are not
    decayed unless ``settings.decay`` is "all": they set no capacity, and decaying them only shrinks
    the signal."""
    trained = [p for p in model.parameters() if p.requires_grad]
    of_vectors = settings.weight_decay if settings.decay == "all" else 0.0
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": of_vectors},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, fused=True if settings.fused else None
    )


def updates_done(optimizer: torch.optim.Optimizer, updates: int, parameter: Tensor) -> Tensor:
    """AdamW's ``step`` of a parameter, float32 []: the fused kernel reads it on the device, and the
    others on the host."""
    where = parameter.device if optimizer.defaults["fused"] else "cpu"
    return torch.tensor(float(updates), device=where)
