"""Started by a launcher, with a backend's name: takes two bf16 steps and prints what really runs.

Printed by rank 0, as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.cli import _leave_launch
from dist_train.config import OptimSettings, TrainSettings
from dist_train.engine.backends import make_backend
from dist_train.engine.optim import make_optimizer


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_of(parameter: nn.Parameter) -> int:
    # ZeRO-3 keeps its shard beside the parameter.
    return local(getattr(parameter, "ds_tensor", parameter)).numel()


def main() -> None:
    settings = TrainSettings.model_validate({"backend": sys.argv[1], "precision": "bf16"})
    backend = make_backend(settings, clip_norm=1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 1))
    computed: set[str] = set()
    # Of the convolution: Accelerate turns the model's outputs back into float32.
    model[0].register_forward_hook(lambda module, inputs, output: computed.add(str(output.dtype)))
    backend.wrap(model, lambda wrapped: make_optimizer(wrapped, OptimSettings()))
    for _ in range(2):
        with backend.micro_step(last=True):
            output = backend.model(torch.randn(4, 1, 4, 4, 4))
            backend.backward(output.float().square().mean())
        backend.update()
    engine = backend.model
    zero = sys.argv[1].startswith("zero")
    optimizer = (
        engine.optimizer if zero else getattr(backend.optimizer, "optimizer", backend.optimizer)
    )
    moments = optimizer.optimizer.state if zero else optimizer.state
    held = sum(local(s["exp_avg"]).numel() for s in moments.values() if "exp_avg" in s)
    facts = {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if zero else 0,
        "partitions_gradients": bool(getattr(optimizer, "partition_gradients", False)),
        "world": backend.world,
        "computed": sorted(computed),
        "state": sorted({str(t.dtype) for t in backend.module.state_dict().values()}),
        "parameters": sum(backend.numels[name] for name, _ in backend.trained()),
        "weights_held": backend.gather(sum(held_of(p) for _, p in backend.trained())),
        "moments_held": backend.gather(held),
        "ranks": backend.gather(backend.rank),
        "sum": backend.sums([backend.rank])[0],
        "from_main": backend.gather(backend.from_main(f"of rank {backend.rank}")),
        "gathered_statistics": backend.gather(
            backend.state(lambda name: True)["model/1.running_mean"].tolist()
        ),
    }
    if backend.is_main:
        print("FACTS", json.dumps(facts))
    backend.close()
    # As the train command does.
    _leave_launch()


main()
