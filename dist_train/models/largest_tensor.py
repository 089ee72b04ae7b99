"""How many elements the largest tensor of a forward pass has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.models.resnet3d import ResNet3D

log = logging.getLogger(__name__)

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
        x = torch.empty(tuple(shape))
        largest = _Largest()
        largest.elements = x.numel()
        with largest:
            if isinstance(model, ResNet3D):
                for steps in model.parts()[0]:
                    for step in steps:
                        x = step(x)
            else:
                _run_as_far_as_it_goes(model, x)
    return largest.elements


def _run_as_far_as_it_goes(model: nn.Module, x: Tensor) -> None:
    try:
        model(x, None)
    # Of a model from outside: it may need values, of which tensors of the meta device have none.
    except (RuntimeError, NotImplementedError):
        log.debug("the largest tensor is sought among the first ones only", exc_info=True)


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
