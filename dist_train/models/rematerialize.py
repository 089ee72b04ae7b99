"""Tensors that autograd need not keep, because they are cheaply made again from ones it keeps.

Within ``remaking()``, a tensor made by ``recomputable`` is not kept for the backward pass, however
many operations save it: they share one recipe, which runs when the first of them needs the tensor.
The result is held until the last of them is done.

This is activation checkpointing (Chen et al. 2016) of single tensors by saved-tensor hooks, as
in-place activated batch normalisation (Rota Bulò et al. 2018) does it for its one operation; but
nothing is inverted, so that what is made again has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dist_train.models.recompute_once import TwoPasses

_tape: ContextVar[_Tape | None] = ContextVar("_tape", default=None)


@contextmanager
def remaking() -> Iterator[None]:
    """Within it ``recomputable`` and ``forget`` act; elsewhere they do nothing special.

    All kept tensors of one such context are freed together, so it should hold no more than a block
    of the network. Hooks on saved tensors that are set around it see what it keeps.
    """
    tape = _Tape()
    token = _tape.set(tape)
    try:
        with saved_tensors_hooks(tape.pack, _Saved.get):
            yield
    finally:
        _tape.reset(token)
    tape.close()


def recomputable(make: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """``make(x, *others)``, to be made again from ``x`` rather than kept.

    Args:
        make: gives the same bits for the same ``x``, draws no random number, and talks to nobody
            but through ``passes.once``.
        x: a tensor that is kept, or is itself made again.
        others: arguments that weigh nothing.
    """
    if _tape.get() is None:
        return make(x, *others)
    passes = TwoPasses()
    with passes.first():
        y = make(x, *others)
    forget(y, make, x, *others, passes=passes)
    return y


def forget(
    y: Tensor,
    make: Callable[..., Tensor],
    x: Tensor,
    *others: Any,
    passes: TwoPasses | None = None,
) -> None:
    """Let ``y``, which is there already, be made again as ``make(x, *others)``."""
    tape = _tape.get()
    if tape is None:
        return
    device = x.device.type
    arithmetic = partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
    )
    source, passes = tape.saved(x), passes or TwoPasses()

    def again() -> Tensor:
        with torch.no_grad(), arithmetic(), passes.second():
            return make(source.get(), *others)

    tape.saved(y).recipe = again


class _Saved:
    """One tensor that the backward pass wants: held here, held by a ``_Keeper``, or a recipe."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.recipe: Callable[[], Tensor] | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            assert self.recipe is not None
            self.tensor, self.recipe = self.recipe(), None
        return self.tensor


class _Tape:
    """What autograd saves within one ``remaking()``."""

    def __init__(self) -> None:
        # Tensors are known by their place in memory. It holds them all until it is closed, so that
        # no place is used twice.
        self._saved: dict[tuple[object, ...], _Saved] = {}

    def saved(self, tensor: Tensor) -> _Saved:
        place = tensor.untyped_storage()._cdata, tensor.storage_offset()
        key = (*place, tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._saved:
            self._saved[key] = _Saved(tensor.detach())
        return self._saved[key]

    pack = saved

    def close(self) -> None:
        """Let go of what has a recipe, and hand the rest to autograd."""
        kept = []
        for saved in self._saved.values():
            if saved.recipe is not None:
                saved.tensor = None
            # Vectors (statistics, indices) stay where they are: they weigh nothing, and running
            # statistics may change before the backward pass, which autograd would refuse.
            elif saved.tensor is not None and saved.tensor.ndim > 1:
                kept.append(saved)
        tensors = [saved.get() for saved in kept]
        anchor = torch.empty(0, requires_grad=True)
        keeper = _Keeper.apply(anchor, *tensors).grad_fn  # type: ignore[no-untyped-call]
        for number, saved in enumerate(kept):
            saved.tensor, saved.recipe = None, partial(_kept_by, keeper, number)
        self._saved.clear()


class _Keeper(torch.autograd.Function):
    """A node beside the graph that saves tensors, so that hooks set around the tape apply."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AssertionError("it is no part of the graph")


def _kept_by(keeper: Any, number: int) -> Tensor:
    tensor: Tensor = keeper.saved_tensors[number]
    return tensor
