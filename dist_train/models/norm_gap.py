"""What running statistics change in what a model says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_train.models.norm import norms


@torch.no_grad()
def by_running_and_own_statistics(model: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Output of ``model(*inputs)`` in eval mode, and the same but for normalisation, which is by
    the statistics of the batch itself, as in training.

    Nothing else differs: there is no dropout, and running statistics do not move. Afterwards the
    model is in the mode that it was in. Where processes share statistics, all must call it.
    """
    training = model.training
    model.eval()
    by_running: Tensor = model(*inputs)
    try:
        for norm in norms(model):
            norm.train()
            norm.observer = _ignore
        by_own: Tensor = model(*inputs)
    finally:
        for norm in norms(model):
            norm.observer = None
        model.train(training)
    return by_running, by_own


def _ignore(mean: Tensor, var: Tensor, count: Tensor) -> None:
    """An observer to which batches do not matter."""
