"""The size of the largest tensor of a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        largest = _Largest(x.numel())
        with largest:
            try:
                model(x, None)
            # Autocast does not know the meta device, so a ResNet ends at its last layer. A model
            # from outside may need values, which tensors of the meta device lack.
            except Exception:
                log.debug("only the tensors before this error were seen", exc_info=True)
    return largest.elements


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return outputs
