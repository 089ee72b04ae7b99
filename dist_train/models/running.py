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

    Results are the same. After an error no update is made. A layer may run once inside.
    """
    updates = _Updates()
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

    Args:
        statistics: of the batch.
        momentum: weight of the batch.
    """
    deferred = _deferred.get()
    updates = _Updates() if deferred is None else deferred
    dtypes = mean.dtype, statistics.mean.dtype, statistics.var.dtype, statistics.number.dtype
    key = mean.device, momentum, *dtypes
    updates.layers.setdefault(key, []).append(_Layer(mean, var, statistics))
    if deferred is None:
        updates.apply()


class _Layer(NamedTuple):
    mean: Tensor
    var: Tensor
    batch: Statistics


class _Updates:
    """Pending updates. Layers of one device, momentum and dtypes share a key and the launches."""

    def __init__(self) -> None:
        self.counters: list[Tensor] = []
        self.layers: dict[tuple[torch.device, float, *tuple[torch.dtype, ...]], list[_Layer]] = {}

    @torch.no_grad()
    def apply(self) -> None:
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


_deferred: ContextVar[_Updates | None] = ContextVar("_deferred", default=None)
