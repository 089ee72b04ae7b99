"""Tensors that autograd does not keep, because recomputing them from kept ones is cheap.

Within ``rematerializing()``, a tensor made by ``recomputable`` is not kept for the backward pass.
It is computed again when the first operation needs it, and held until the last one is done.

This is activation checkpointing (Chen et al. 2016) of single tensors by saved-tensor hooks.
In-place activated batch normalisation (Rota Bulò et al. 2018) does it for one operation; here
nothing is inverted, so the recomputed tensor has the same bits.
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
def rematerializing() -> Iterator[None]:
    """Activate ``recomputable`` and ``forget``, which elsewhere have no effect.

    All kept tensors of one such context are freed together, so it should hold at most a block of
    the network. Saved-tensor hooks around it see the kept tensors.
    """
    tape = _Tape()
    token = _tape.set(tape)
    try:
        with saved_tensors_hooks(tape.saved, _Saved.get):
            yield
    finally:
        _tape.reset(token)
    tape.close()


def recomputable(make: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """``make(x, *others)``, recomputed in the backward pass.

    Args:
        make: deterministic; draws no random number, and calls an all-reduce through ``once`` only.
        x: a tensor that is kept or recomputable.
        others: small arguments, kept until the backward pass.
    """
    if _tape.get() is None:
        return make(x, *others)
    passes = TwoPasses()
    with passes.first():
        y = make(x, *others)
    forget(y, make, x, *others, passes=passes)
    return y


def forget(
    y: Tensor, make: Callable[..., Tensor], x: Tensor, *others: Any, passes: TwoPasses | None = None
) -> None:
    """Do not keep ``y``; recompute it as ``make(x, *others)``."""
    tape = _tape.get()
    if tape is None:
        return
    device = x.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    source, passes = tape.saved(x), passes or TwoPasses()

    def again() -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype, enabled), passes.second():
            return make(source.get(), *others)

    tape.saved(y).recipe = again


class _Saved:
    """A tensor that the backward pass needs: held here, or computed by ``recipe``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.recipe: Callable[[], Tensor] | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            assert self.recipe is not None
            self.tensor, self.recipe = self.recipe(), None
        return self.tensor


class _Tape:
    """The tensors that autograd saves within one ``rematerializing()``."""

    def __init__(self) -> None:
        # Tensors are identified by their address. The tape holds them all until it is closed, so
        # that no address is used twice.
        self._saved: dict[tuple[object, ...], _Saved] = {}

    def saved(self, tensor: Tensor) -> _Saved:
        address = tensor.untyped_storage()._cdata, tensor.storage_offset()
        key = (*address, tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._saved:
            self._saved[key] = _Saved(tensor.detach())
        return self._saved[key]

    def close(self) -> None:
        """Free the tensors that have a recipe, and hand the others to autograd."""
        kept, tensors = [], []
        for saved in self._saved.values():
            if saved.recipe is not None:
                saved.tensor = None
            # Vectors (statistics, indices) stay here: they are small, and running statistics may
            # change before the backward pass, which autograd would refuse.
            elif saved.tensor is not None and saved.tensor.ndim > 1:
                kept.append(saved)
                tensors.append(saved.tensor)
        anchor = torch.empty(0, requires_grad=True)
        keeper = _Keeper.apply(anchor, *tensors)  # type: ignore[no-untyped-call]
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
        raise AssertionError("this node is not part of the graph")


def _kept_by(keeper: Tensor, number: int) -> Tensor:
    # The tensor is held, not its node: before torch 2.12 a node ended with its tensor.
    tensor: Tensor = keeper.grad_fn.saved_tensors[number]  # type: ignore[union-attr]
    return tensor
