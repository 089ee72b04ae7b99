"""Lists of tensors for torch's foreach operations, which are one launch where dtypes are equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in a list for each dtype, in their order. Of lists of mixed dtypes torch makes
    one launch a tensor."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())


@torch.no_grad()
def zero_gradients(module: nn.Module) -> None:
    """Set all gradients there are to zero, where they lie."""
    gradients = (p.grad for p in module.parameters() if p.grad is not None)
    for same in by_dtype(gradients):
        torch._foreach_zero_(same)
