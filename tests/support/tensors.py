"""Comparing tensors by name, and recording the operations that torch runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal dtypes and values, with a tolerance relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        worst, largest = (value - expected[name]).abs().max(), expected[name].abs().max()
        assert worst <= tolerance * largest, (name, worst, largest)


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
