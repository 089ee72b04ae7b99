"""Running statistics of many layers, moved by a few launches in place of several for each layer.

A CUDA kernel of a few numbers costs the host as much as one of millions, and a ResNet-101 has 104
layers of batch normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.models.sync_norm import Statistics


@contextmanager
def moved_together() -> Iterator[None]:
    """Within it ``count_batch`` and ``move`` only note what is to be done. It is done at the end,
    with the same results; after an error, not at all.

    A layer may run once within it.
    """
    moves = _Moves()
    token = _moves.set(moves)
    try:
        yield
    finally:
        _moves.reset(token)
    moves.make()


def count_batch(counter: Tensor) -> None:
    """Add 1 to an integer [] that counts the batches of a layer."""
    moves = _moves.get()
    if moves is None:
        counter.add_(1)
    else:
        moves.counters.append(counter)


def move(mean: Tensor, var: Tensor, statistics: Statistics, momentum: float) -> None:
    """Move the running mean and the running unbiased variance of a layer, [C] each, towards the
    statistics of a batch, whose weight is ``momentum``."""
    moves = _moves.get()
    now = _Moves() if moves is None else moves
    dtypes = mean.dtype, statistics.mean.dtype, statistics.var.dtype, statistics.number.dtype
    key = mean.device, momentum, *dtypes
    now.layers.setdefault(key, []).append(_Layer(mean, var, statistics))
    if moves is None:
        now.make()


class _Layer(NamedTuple):
    mean: Tensor
    var: Tensor
    batch: Statistics


class _Moves:
    """What is to be done. The key of ``layers`` is their device, momentum and dtypes: those of one
    key are moved by the same launches."""

    def __init__(self) -> None:
        self.counters: list[Tensor] = []
        self.layers: dict[tuple[torch.device, float, *tuple[torch.dtype, ...]], list[_Layer]] = {}

    @torch.no_grad()
    def make(self) -> None:
        if self.counters:
            torch._foreach_add_(self.counters, 1)
        for (_, momentum, *_), layers in self.layers.items():
            sizes = [len(layer.mean) for layer in layers]
            number = torch.cat(
                [layer.batch.number.reshape(1).expand(len(layer.mean)) for layer in layers]
            )
            mean = torch.cat([layer.batch.mean for layer in layers])
            var = torch.cat([layer.batch.var for layer in layers])
            unbiased = var * (number / (number - 1).clamp(min=1))
            running = [layer.mean for layer in layers], [layer.var for layer in layers]
            for old, new in zip(running, (mean, unbiased), strict=True):
                pieces = torch.split(new.to(old[0].dtype), sizes)
                torch._foreach_lerp_(old, pieces, momentum)


_moves: ContextVar[_Moves | None] = ContextVar("_moves", default=None)
