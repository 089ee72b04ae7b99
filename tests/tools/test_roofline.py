"""Operations counted by shapes alone are those that run, and take what binds each of them."""

from __future__ import annotations

from typing import Any

import pytest
import roofline
import torch
from roofline import Ceilings, Operation, count_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dist_train.models.registry import build_model

# Deep enough that no convolution is given more frames than its own: see models/layers.py.
SHAPE = (2, 1, 48, 32, 32)


def test_flops_are_those_of_a_step_that_runs() -> None:
    operations = count_step("resnet3d-10", SHAPE, "fp32", torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        build_model("resnet3d-10")(torch.rand(SHAPE)).sum().backward()
    assert sum(op.flops for op in operations) == counter.get_total_flops()


def test_half_the_bytes_move_in_half_the_precision() -> None:
    """Of what convolutions and normalisation read and write."""
    moved = {}
    for precision in ("fp32", "bf16"):
        operations = count_step("resnet3d-10", SHAPE, precision, torch.device("cpu"))
        moved[precision] = sum(op.moved for op in operations if "aten.convolution.d" in op.name)
    assert moved["bf16"] == moved["fp32"] / 2


def test_each_operation_takes_what_binds_it() -> None:
    ceilings = Ceilings({"fp32": 100.0, "bf16": 400.0}, bandwidth=10.0)
    computing = Operation("a", flops=1000, moved=10, dtype=torch.float32)
    faster = Operation("a", flops=1000, moved=10, dtype=torch.bfloat16)
    moving = Operation("b", flops=0, moved=40, dtype=torch.float32)
    assert ceilings.seconds([computing, faster, moving]) == pytest.approx(10 + 2.5 + 4)


class Operands(TorchDispatchMode):
    """The largest number of different values in operands of products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.different: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "convolution"):
            self.different[name] = min(len(x.float().unique()) for x in args[:2])
        return func(*args, **(kwargs or {}))


def test_ceilings_are_measured_on_random_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ones a card draws less power, and is faster than in training."""
    monkeypatch.setattr(roofline, "LONG_ENOUGH", 0.0)
    monkeypatch.setattr(roofline, "TIMES", 1)
    cpu = torch.device("cpu")
    with Operands() as operands:
        rates = (
            roofline._product_rate(cpu, torch.float32),
            roofline._convolution_rate(cpu, torch.float32),
        )
    assert min(rates) > 0
    assert operands.different.keys() == {"mm", "convolution"}
    assert min(operands.different.values()) > 10_000
