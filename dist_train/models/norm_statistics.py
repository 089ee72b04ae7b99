"""Statistics of the population for batch normalisation, in place of moving averages.

PreciseBN (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3): moving averages lag
behind weights that move and weigh the last batches most; statistics taken of many batches with the
weights as they are do neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.norm import Observer, norms
from dist_train.models.sync_norm import AllReduce


@contextmanager
def precise_statistics(model: nn.Module, all_reduce: AllReduce | None = None) -> Iterator[None]:
    """Within it, run ``model`` in training mode on many batches; no gradients are needed.

    At the end running means and variances are those of all real values that each layer saw: the
    mean of the batches' means and of their squares, weighted by counts, and E[x^2] - E[x]^2. Within
    it they do not move. After an error they are what they were.

    Args:
        all_reduce: sums a float64 tensor over the processes, in place; it is called once, at the
            end, and gives every process the statistics of all. Needed whether or not processes
            share the statistics that they normalise by.

    Raises:
        ModelError: at the end, a layer saw no batch in any process.
    """
    layers = list(norms(model))
    sums = [torch.zeros(2 * n.num_features + 1, dtype=torch.float64) for n in layers]
    sums = [s.to(n.running_mean.device) for s, n in zip(sums, layers, strict=True)]
    for norm, of_norm in zip(layers, sums, strict=True):
        norm.observer = _adder(of_norm)
    try:
        yield
    finally:
        for norm in layers:
            norm.observer = None
    together = torch.cat(sums)
    if all_reduce is not None:
        all_reduce(together)
    sums = list(torch.split(together, [len(s) for s in sums]))
    if any(float(of_norm[-1]) == 0 for of_norm in sums):
        raise ModelError(
            "a batch normalisation saw no batch",
            where="statistics of the population",
            fix="Run the model in training mode on at least one batch",
        )
    for norm, of_norm in zip(layers, sums, strict=True):
        mean, square = (of_norm[:-1] / of_norm[-1]).chunk(2)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp(min=0.0))


def _adder(sums: Tensor) -> Observer:
    """An observer that adds count * mean, count * mean of squares, and count to [2C + 1]."""

    def add(mean: Tensor, var: Tensor, count: Tensor) -> None:
        mean, var, count = mean.double(), var.double(), count.double().view(1)
        sums.add_(torch.cat([count * mean, count * (var + mean.square()), count]))

    return add


# What running statistics change in what a model says.


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
