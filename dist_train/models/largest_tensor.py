"""The size of the largest tensor of a forward pass."""

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

#: CUDA kernels index with 32 bits up to this many elements (torch's ``canUse32BitIndexMath``).
#: Beyond it torch's convolutions leave cuDNN or split the batch; other kernels take slower paths.
INDEXED_BY_32_BITS = 2**31 - 1


def largest_tensor(make_model: Callable[[], nn.Module], shape: Sequence[int]) -> int:
    """Elements of the largest tensor in the forward pass of clips of ``shape`` [B, C, D, H, W].

    The model runs on the meta device, whose tensors have no data: a third of a second for a
    ResNet-101, and no memory. The result is proportional to B.
    """
    with torch.device("meta"), torch.no_grad():
        # Training mode makes the same tensors, but refuses statistics of a single voxel.
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
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return outputs
