"""LAMB: AdamW's update of each tensor, scaled to the size of the tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: In the denominator of Adam's update; that of the paper's code.
EPSILON = 1e-6


class Lamb(torch.optim.Optimizer):
    """Algorithm 2 of You et al., "Large batch optimization for deep learning" (2020), with its
    bias correction, and the identity for phi.

    Args:
        groups: parameter groups. ``trust`` says whether updates are scaled by the ratio of norms;
            the paper's code leaves out what does not decay.
        all_reduce: sums a tensor over the ranks in place; called once for each group of sharded
            tensors.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        all_reduce: Callable[[Tensor], None] = lambda tensor: None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": 0.0, "trust": True}
        super().__init__(groups, defaults)
        self._all_reduce = all_reduce

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        is_sharded = isinstance(parameters[0], DTensor)
        weights, gradients, means, squares = (
            [_local(tensor) for tensor in tensors]
            for tensors in (
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            )
        )
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        for state in states:
            state["step"] += 1
        # On the host, so this does not wait for the device.
        steps = [float(state["step"]) for state in states]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, EPSILON)
        updates = torch._foreach_div(means, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["trust"]:
            ratios = self._ratios(weights, updates, is_sharded)
            torch._foreach_mul_(updates, list(ratios.to(updates[0].dtype).unbind()))
        torch._foreach_add_(weights, updates, alpha=-lr)

    def _ratios(
        self, weights: Sequence[Tensor], updates: Sequence[Tensor], is_sharded: bool
    ) -> Tensor:
        """Norm of each weight over that of its update, [tensors]; 1 where either is zero."""
        norms = torch.stack(
            [
                torch.stack(list(torch._foreach_norm(list(tensors))))
                for tensors in (weights, updates)
            ]
        )
        if is_sharded:
            # Of whole tensors, whose shards lie on all ranks.
            norms.square_()
            self._all_reduce(norms)
            norms.sqrt_()
        weight, update = norms
        return torch.where((weight > 0) & (update > 0), weight / update, 1.0)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
