"""How many elements the largest tensor of a forward pass has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.models.resnet3d import ResNet3D

#: Kernels of CUDA index with 32 bits up to here (torch's ``canUse32BitIndexMath``). Of larger
#: tensors torch's convolutions do without cuDNN, or cut the batch, and others take slower paths.
INDEXED_BY_32_BITS = 2**31 - 1


def largest_tensor(make_model: Callable[[], nn.Module], shape: Sequence[int]) -> int:
    """Elements of the largest tensor that the forward pass of clips [B, C, D, H, W] makes.

    The model is made and run on the meta device, whose tensors have shapes but no data: this takes
    a third of a second for a ResNet-101, and no memory. It is proportional to B.
    """
    with torch.device("meta"), torch.no_grad():
        # Training makes the same tensors, but refuses statistics of a single voxel.
        model = make_model().eval()
        assert isinstance(model, ResNet3D)
        x = torch.empty(tuple(shape))
        parts, _ = model.parts()
        largest = _Largest()
        with largest:
            for steps in parts:
                for step in steps:
                    x = step(x)
    return largest.elements


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made
