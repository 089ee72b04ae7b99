"""The ceilings of a machine, and the least time of a training step under them (roofline model).

The ceilings are measured: FLOP/s of matrix products and convolutions, and bytes/s of copies. An
operation takes the longer of its FLOPs over the first and its bytes (inputs and outputs, each once)
over the second (Williams et al. 2009). Operations are those that PyTorch runs one by one, so a
compiler that fuses them can be faster than this model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measuring import seconds
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits, conv3d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_train.models.registry import build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Seconds that timed work should take, and the number of repetitions, of which the best counts.
LONG_ENOUGH, TIMES = 0.1, 4


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s by precision, and bytes/s of a copy (reading and writing)."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, operations: Sequence[Operation]) -> float:
        """The least time of a graph."""
        peak = {DTYPES[name]: flops for name, flops in self.flops.items()}
        slowest = min(peak.values())
        return sum(
            max(op.flops / peak.get(op.dtype, slowest), op.moved / self.bandwidth)
            for op in operations
        )


def measure_ceilings(device: torch.device, precisions: Sequence[str]) -> Ceilings:
    """Measure products of square matrices, 3x3x3 convolutions and a copy.

    Operands are random: with ones a GPU draws less power and clocks higher than in training.
    """
    flops = {
        name: max(_product_rate(device, DTYPES[name]), _convolution_rate(device, DTYPES[name]))
        for name in precisions
    }
    size = 2**28 if device.type == "cpu" else 2**30
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * size / best(lambda: target.copy_(source), device))


def best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls; a first call is not counted."""
    work()
    return min(seconds(work, device) for _ in range(TIMES))


@torch.no_grad()
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s; the matrices grow to 8192 rows, or until one product takes ``LONG_ENOUGH``."""
    rate = 0.0
    for power in range(8, 14):
        n = 2**power
        a = torch.randn(n, n, device=device).to(dtype)
        took = best(partial(torch.mm, a, a), device)
        rate = max(rate, 2 * n**3 / took)
        if took > LONG_ENOUGH:
            break
    return rate


@torch.no_grad()
def _convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of 3x3x3 with 256 channels, channels last; frames as in ``_product_rate``."""
    rate, channels = 0.0, 256
    weight = torch.randn(channels, channels, 3, 3, 3, device=device)
    weight = weight.to(dtype, memory_format=torch.channels_last_3d)
    for power in range(0, 8):
        x = torch.randn(1, channels, 2**power, 20, 20, device=device)
        x = x.to(dtype, memory_format=torch.channels_last_3d)
        took = best(partial(conv3d, x, weight, padding=1), device)
        rate = max(rate, 2 * 27 * channels**2 * x[0, 0].numel() / took)
        if took > LONG_ENOUGH:
            break
    return rate


@dataclass(frozen=True)
class Operation:
    """One operation: its name, FLOPs, bytes read and written, and the dtype of its arithmetic."""

    name: str
    flops: int
    moved: int
    dtype: torch.dtype


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the operations that run inside the block, except views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not outputs or func.is_view:
            return out
        count = flop_registry.get(func.overloadpacket)
        flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        # The largest tensor has the dtype of the arithmetic; others are scales, sums or indices.
        largest = max(inputs + outputs, key=lambda tensor: tensor.numel())
        moved = sum(tensor.numel() * tensor.itemsize for tensor in inputs + outputs)
        self.operations.append(Operation(str(func), flops, moved, largest.dtype))
        return out


def count_step(
    model: str, shape: tuple[int, int, int, int, int], precision: str, device: torch.device
) -> list[Operation]:
    """The operations of a forward and backward pass, counted from shapes; nothing is computed.

    Args:
        model: a name of the registry, with its default settings.
        shape: [B, 1, D, H, W] of clips without padding.
        precision: of autocast.
    """
    dtype = DTYPES[precision]
    count = Count()
    with FakeTensorMode(), torch.device(device):
        net = build_model(model)
        clips, labels = torch.empty(shape), torch.empty(shape[0])
        with count:
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                logits = net(clips, None)
            binary_cross_entropy_with_logits(logits, labels).backward()  # type: ignore[no-untyped-call]
    return count.operations
