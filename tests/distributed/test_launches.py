"""Kernel launches of a step: for each layer only those that compute it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_config, tiny_store
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.distributed.foreach import zero_gradients
from dist_train.training.step import BufferCopy
from dist_train.training.train import train
from dist_train.training.trainer import Trainer

# They launch nothing.
VIEWS = {"detach", "view", "unsqueeze", "squeeze", "t", "alias", "lift_fresh", "empty"}
#: Of a step of a ResNet-18, with 20 convolutions each with its normalisation, and 8 residual
#: blocks, 3 of which have a shortcut of their own, whose normalisation is not rectified.
NORMS, BLOCKS, SHORTCUTS = 20, 8, 3
OF_EACH_LAYER = {
    "convolution": NORMS,
    "native_batch_norm": NORMS,
    "relu": NORMS - SHORTCUTS,
    "threshold_backward": NORMS - SHORTCUTS,
    "native_batch_norm_backward": NORMS,
    "convolution_backward": NORMS,
    # The shortcut's sum, forward and backward.
    "add": 2 * BLOCKS,
}


class Launches(TorchDispatchMode):
    """Counts operations by name; a foreach operation counts once for each dtype among its tensors,
    or once for each tensor where dtypes are mixed, which is what torch makes of it on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_foreach"):
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.ndim > 0]
            mixed = len({t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)}) > 1
            self.counts[name] += len(tensors) if mixed else 1
        elif name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_launches_nothing_for_each_layer_but_its_own_work(tmp_path: Path) -> None:
    """A step of the whole trainer: copies of the buffers, both passes, clipping, the update, the
    average of weights, and the release of gradients."""
    launches = Launches()
    of_steps: list[Counter[str]] = []

    def before_step(trainer: Trainer, step: int) -> None:
        of_steps.append(Counter(launches.counts))
        launches.counts.clear()

    config = tiny_config(
        tiny_store(tmp_path / "store"),
        tmp_path / "run",
        "model.name=resnet3d-18",
        "optim.fused=true",
        "optim.ema=0.9",
        "train.epochs=1",
        "checkpoint.every_steps=100",
        "snapshots.at=[1]",
    )
    with launches:
        train(config, before_step=before_step)
    # After the first steps weights are compared, and after the last the epoch is validated.
    counts = of_steps[4]
    many = {name: number for name, number in counts.items() if number >= BLOCKS}
    sums = many.pop("add")
    assert many | {"add": OF_EACH_LAYER["add"]} == OF_EACH_LAYER
    assert sums <= OF_EACH_LAYER["add"] + 3
    few = sum(number for name, number in counts.items() if name not in OF_EACH_LAYER)
    assert few <= 60


def test_buffers_are_kept_and_put_back_by_one_launch_for_each_dtype() -> None:
    module = nn.Sequential(*(nn.BatchNorm3d(2) for _ in range(5)))
    buffers = BufferCopy(module)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with Launches() as launches:
        buffers.keep()
        module(torch.randn(2, 2, 3, 3, 3))
        buffers.put_back()
    assert launches.counts["_foreach_copy_"] == 4
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_gradients_are_zeroed_where_they_lie_by_one_launch_for_each_dtype() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4).double(), nn.Linear(4, 4))
    for parameter in module[:2].parameters():
        parameter.grad = torch.ones_like(parameter)
    places = [p.grad.data_ptr() for p in module[:2].parameters() if p.grad is not None]
    with Launches() as launches:
        zero_gradients(module)
    assert launches.counts == {"_foreach_zero_": 2}
    assert [p.grad.data_ptr() for p in module[:2].parameters() if p.grad is not None] == places
    assert not any(p.grad.any() for p in module[:2].parameters() if p.grad is not None)
    assert module[2].weight.grad is None
