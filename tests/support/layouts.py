"""Sees which operations of a network are not channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYOUT = torch.channels_last_3d
HEAVY = ("convolution", "batch_norm", "relu", "threshold", "max_pool3d", "add")


def is_activation(x: Any) -> bool:
    """A tensor whose strides tell all orders of its five axes apart: not one number, expanded."""
    return isinstance(x, Tensor) and x.ndim == 5 and min(x.shape) > 1 and 0 not in x.stride()


def is_channels_last(x: Tensor) -> bool:
    """Also a slice of channels."""
    return x.stride(1) == min(x.stride())


class Layouts(TorchDispatchMode):
    """Records heavy operations that are not channels last, and copies into another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.wrong: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if is_activation(x)]
        outputs = [x for x in tree_leaves(out) if is_activation(x)]
        if any(heavy in name for heavy in HEAVY):
            self.seen += 1
            if not all(map(is_channels_last, inputs + outputs)):
                self.wrong.append(name)
        if name in ("clone", "_to_copy", "copy_", "contiguous"):
            layouts = set(map(is_channels_last, inputs + outputs))
            if layouts not in ({True}, set()):
                self.wrong.append(name)
        return out
