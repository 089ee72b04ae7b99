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

    Each rank averages its shards of the weights, so it takes as much memory as one of
    AdamW's moments. The average begins with the weights at construction, and its decay rises with
    the steps, or it would hold on to these for long.

    Args:
        backend: after ``wrap``.
        decay: share of the average that a late step leaves; None for no average at all.
    """

    def __init__(self, backend: Backend, decay: float | None) -> None:
        self._backend, self._decay = backend, decay
        self._averages: dict[str, Tensor] = {}
        if decay is not None:
            self._averages = {name: part.clone() for name, part in backend.local_tensors()}

    def update(self, step: int) -> None:
        """Take in the weights after a step; ``step`` counts those before it."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        live = [part for _, part in self._backend.local_tensors()]
        # It is without annotations.
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self._averages.values()), live, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the module has the averages for its weights; afterwards its own again, to the
        bit. A collective call."""
        self._exchange()
        yield
        self._exchange()

    def sizes(self) -> dict[str, int]:
        """Elements of each tensor of ``state``, on every rank."""
        return {PREFIX + name: self._backend.numels[name] for name in self._averages}

    def state(self, mine: Callable[[str], bool]) -> dict[str, Tensor]:
        """The full averages for which ``mine(name)``, as ``Backend.state``. A collective call."""
        self._backend.sync(self._averages[name] for name in self._buffers())
        kept = {}
        for name, part in self._averages.items():
            full = self._backend.gather_full(name, part)
            if mine(PREFIX + name):
                kept[PREFIX + name] = full
        return kept

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave, of any world size and backend; the weights, where it was
        saved without an average."""
        for name, average in self._averages.items():
            # One at a time: under ZeRO-3 and FSDP a rank may have no room for all full tensors.
            full = averaged(state, [name])[name]
            average.copy_(self._backend.local_shard(name, full))

    def _buffers(self) -> list[str]:
        return [name for name, _ in self._backend.module.named_buffers() if name in self._averages]

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
    """The averages in a whole training state, or what has none itself, by parameter name."""
    keys = ((name, PREFIX + name) for name in names)
    return {name: state[key if key in state else f"model/{name}"] for name, key in keys}
