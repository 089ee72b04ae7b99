"""An exponential moving average of the weights (Polyak & Juditsky 1992), under any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dist_train.distributed.backends.base import Backend

PREFIX = "ema/"


class Ema:
    """The average of weights and BatchNorm statistics over steps, for validation and snapshots.

    Each rank averages its shards of the weights, which takes as much memory as one of AdamW's
    moments. The average begins with the weights at construction; its decay rises with the steps, or
    those would count for long.

    Args:
        backend: after ``wrap``.
        decay: share of the old average that a late step keeps; None for no average at all.
    """

    def __init__(self, backend: Backend, decay: float | None) -> None:
        self._backend, self._decay = backend, decay
        self._averages: dict[str, Tensor] = {}
        if decay is not None:
            self._averages = {name: shard.clone() for name, shard in backend.local_tensors()}

    def update(self, step: int) -> None:
        """Include the weights after a step; ``step`` counts from 0."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        live = [shard for _, shard in self._backend.local_tensors()]
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self._averages.values()), live, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the module has the averages as its weights; afterwards its own weights
        again, to the bit. A collective call."""
        self._exchange()
        yield
        self._exchange()

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of each tensor of ``state``, on every rank."""
        return {PREFIX + name: self._backend.numels[name] for name in self._averages}

    def state(self, mine: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return the full averages for which ``mine(name)``. A collective call."""
        buffers = (name for name, _ in self._backend.module.named_buffers())
        self._backend.sync(self._averages[name] for name in buffers if name in self._averages)
        kept = {}
        for name, shard in self._averages.items():
            full = self._backend.gather_full(name, shard)
            if mine(PREFIX + name):
                kept[PREFIX + name] = full
        return kept

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the averages of a training state, or its weights if it has no averages."""
        for name, average in self._averages.items():
            # One at a time: under ZeRO-3 and FSDP a rank may have no room for all full tensors.
            full = averaged(state, [name])[name]
            average.copy_(self._backend.local_shard(name, full))

    @torch.no_grad()
    def _exchange(self) -> None:
        if self._decay is None:
            return
        for name, live in self._backend.local_tensors():
            own = live.clone()
            live.copy_(self._averages[name])
            self._averages[name].copy_(own)
        self._backend.local_tensors_changed()
        self._backend.sync_buffers()


def averaged(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the averages in a training state by parameter name; the weights of those without."""
    keys = ((name, PREFIX + name) for name in names)
    return {name: state[key if key in state else f"model/{name}"] for name, key in keys}
