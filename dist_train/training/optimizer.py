"""The optimizer: AdamW."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.config import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019).

    Biases and BatchNorm's scales, which have one axis, are only decayed if ``settings.decay`` is
    "all": they do not limit the model's capacity, and decay only shrinks the signal.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    of_vectors = settings.weight_decay if settings.decay == "all" else 0.0
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": of_vectors},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, fused=True if settings.fused else None
    )
