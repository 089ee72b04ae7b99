"""Operations counted by shapes alone are those that run, and take what binds each of them."""

from __future__ import annotations

import pytest
import torch
from roofline import Ceilings, Operation, count_step
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
