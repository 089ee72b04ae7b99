"""Update the running statistics of all layers in a few kernel launches instead of a few per layer.

Launching a CUDA kernel costs the host the same for few numbers as for millions, and a ResNet-101
has 104 normalisation layers.
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
def batched_updates() -> Iterator[None]:
    """Defer ``count_batch`` and ``update_running`` to the exit of this context.

    After an error no update is made. A layer may run once inside. All layers must have one device,
    one momentum and one dtype.
    """
    updates = _Updates([], [])
    token = _deferred.set(updates)
    try:
        yield
    finally:
        _deferred.reset(token)
    updates.apply()


def count_batch(counter: Tensor) -> None:
    """Add 1 to a layer's batch counter, an integer []."""
    deferred = _deferred.get()
    if deferred is None:
        counter.add_(1)
    else:
        deferred.counters.append(counter)


def update_running(mean: Tensor, var: Tensor, statistics: Statistics, momentum: float) -> None:
    """Update a layer's running mean and unbiased variance, [C] each, in place.

    ``momentum`` is the weight of the batch's statistics.
    """
    layer, deferred = _Layer(mean, var, statistics, momentum), _deferred.get()
    if deferred is None:
        _Updates([], [layer]).apply()
    else:
        deferred.layers.append(layer)


class _Layer(NamedTuple):
    mean: Tensor
    var: Tensor
    batch: Statistics
    momentum: float


class _Updates(NamedTuple):
    counters: list[Tensor]
    layers: list[_Layer]

    @torch.no_grad()
    def apply(self) -> None:
        if self.counters:
            torch._foreach_add_(self.counters, 1)
        if not self.layers:
            return
        old_means, old_vars, batches, (momentum, *_) = zip(*self.layers, strict=True)
        sizes = [len(mean) for mean in old_means]
        means, variances = (torch.cat([b[i] for b in batches]) for i in (0, 1))
        number = torch.cat(
            [b.number.reshape(1).expand(n) for b, n in zip(batches, sizes, strict=True)]
        )
        unbiased = variances * (number / (number - 1).clamp(min=1))
        for old, new in ((old_means, means), (old_vars, unbiased)):
            torch._foreach_lerp_(old, torch.split(new.to(old[0].dtype), sizes), momentum)


_deferred: ContextVar[_Updates | None] = ContextVar("_deferred", default=None)
