"""Lists of tensors for torch's foreach operations: one kernel launch if all dtypes are equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype, in their order: of mixed dtypes torch launches a kernel a tensor."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())


@torch.no_grad()
def zero_gradients(module: nn.Module) -> None:
    """Set all existing gradients to zero, in place."""
    gradients = (p.grad for p in module.parameters() if p.grad is not None)
    for same in by_dtype(gradients):
        torch._foreach_zero_(same)
