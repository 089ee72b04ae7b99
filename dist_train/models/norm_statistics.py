"""Population statistics for batch normalisation, in place of moving averages.

PreciseBN (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3): statistics over many
batches with fixed weights. Moving averages lag behind the weights and favour the last batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.norm import norms
from dist_train.models.sync_norm import AllReduce


@contextmanager
def precise_statistics(model: nn.Module, all_reduce: AllReduce | None = None) -> Iterator[None]:
    """Set running statistics from all batches that ``model`` sees inside this context.

    Inside it, run ``model`` in training mode on many batches; gradients are not needed. On exit
    each layer's running mean is E[x] and its running variance E[x^2] - E[x]^2 over all real values;
    frozen layers keep theirs. After an error the running statistics are unchanged.

    Args:
        all_reduce: called once, on exit. Needed with several processes, whether or not they share
            batch statistics.

    Raises:
        ModelError: on exit, a layer saw no batch in any process.
    """
    layers = [norm for norm in norms(model) if not norm.frozen]
    if not layers:
        yield
        return
    sums = [n.running_mean.new_zeros(2 * n.num_features + 1, dtype=torch.float64) for n in layers]
    for norm, norm_sums in zip(layers, sums, strict=True):
        norm.observer = partial(_add, norm_sums)
    try:
        yield
    finally:
        for norm in layers:
            norm.observer = None
    all_sums = torch.cat(sums)
    if all_reduce is not None:
        all_reduce(all_sums)
    split = torch.split(all_sums, [len(s) for s in sums])
    if not all(norm_sums[-1] for norm_sums in split):
        raise ModelError(
            "a batch normalisation layer saw no batch",
            where="population statistics",
            fix="Run the model in training mode on at least one batch",
        )
    for norm, norm_sums in zip(layers, split, strict=True):
        mean, square = (norm_sums[:-1] / norm_sums[-1]).chunk(2)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp(min=0.0))


def _add(sums: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Add count * E[x], count * E[x^2] and count to ``sums`` [2C + 1]."""
    mean, var, count = mean.double(), var.double(), count.double().view(1)
    sums.add_(torch.cat([count * mean, count * (var + mean.square()), count]))


@torch.no_grad()
def by_running_and_own_statistics(model: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Outputs of ``model(*inputs)`` normalised by running statistics, and by the batch's own.

    Both are in eval mode otherwise: no dropout, and running statistics do not change. If processes
    share statistics, all must call this. Frozen layers have their running statistics both times.
    """
    training = model.training
    model.eval()
    by_running: Tensor = model(*inputs)
    try:
        for norm in norms(model):
            norm.train()
            norm.observer = lambda *_: None
        by_own: Tensor = model(*inputs)
    finally:
        for norm in norms(model):
            norm.observer = None
        model.train(training)
    return by_running, by_own
