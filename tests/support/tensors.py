"""Comparing tensors by name, with one process or two, and recording the operations of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from thread_group import Threads, on_each_rank
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.models.norm import share_statistics

#: Runs a module on clips [B, C, D, H, W] with real frames [B].
Run = Callable[[Any, Tensor, Tensor], Tensor]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal dtypes and values, with a tolerance relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        worst, largest = (value - expected[name]).abs().max(), expected[name].abs().max()
        assert worst <= tolerance * largest, (name, worst, largest)


def assert_two_processes_equal_one(
    modules: list[nn.Module], clips: Tensor, frames: list[list[int]], run: Run, tolerance: float
) -> None:
    """Train modules 0 and 1 on their parts of the clips with shared statistics, and module 2 on all
    clips. Threads act as the processes."""
    sizes, found = [len(part) for part in frames], {}

    def train_part(ranks: Threads) -> None:
        def all_reduce(sums: Tensor) -> None:
            sums.copy_(torch.stack(ranks.gather(sums.clone())).sum(0))

        module, mine = modules[ranks.rank], clips.split(sizes)[ranks.rank]
        share_statistics(module, all_reduce)
        found[ranks.rank] = _results(module, mine, frames[ranks.rank], run)
        for name, _ in module.named_parameters():
            all_reduce(found[ranks.rank][name])

    assert on_each_rank(2, train_part) == []
    expected = _results(modules[2], clips, frames[0] + frames[1], run)
    for rank in range(2):
        mine = {name: expected[name].split(sizes)[rank] for name in ("output", "input")}
        assert_equal(found[rank], expected | mine, tolerance)


def _results(module: nn.Module, clips: Tensor, frames: list[int], run: Run) -> dict[str, Tensor]:
    """Output, gradients and buffers after a forward and a backward pass."""
    x = clips.clone().requires_grad_()
    y = run(module, x, torch.tensor(frames))
    (y * clips.sin() if y.shape == x.shape else y.square()).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad} | grads | dict(module.named_buffers())


class Calls(TorchDispatchMode):
    """Records the name and the arguments of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))

    def of(self, part: str) -> list[tuple[Any, ...]]:
        """Arguments of the operations with ``part`` in their name."""
        return [args for name, args in self.calls if part in name]
