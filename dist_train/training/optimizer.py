"""The optimizer: AdamW."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.config import FinetuneSettings, OptimSettings
from dist_train.training.parameter_groups import parameter_groups


def make_optimizer(
    model: nn.Module, settings: OptimSettings, finetune: FinetuneSettings | None = None
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019) of ``parameter_groups``."""
    return torch.optim.AdamW(
        parameter_groups(model, settings, finetune or FinetuneSettings()),
        lr=settings.lr,
        betas=settings.betas,
        fused=True if settings.fused else None,
    )
