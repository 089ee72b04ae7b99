"""A rank's program, with a backend's name: takes two bf16 steps; rank 0 prints their dtypes."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from dist_train.cli import _leave_launch
from dist_train.config import OptimSettings, TrainSettings
from dist_train.distributed.backends import make_backend
from dist_train.training.optimizer import make_optimizer


def main() -> None:
    settings = TrainSettings.model_validate(
        {"backend": sys.argv[1], "precision": "bf16", "device": "cpu"}
    )
    backend = make_backend(settings, clip_norm=1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 1))
    computed: set[str] = set()
    # Of the convolution: Accelerate turns the model's outputs back into float32.
    model[0].register_forward_hook(lambda module, inputs, output: computed.add(str(output.dtype)))
    backend.wrap(model, lambda wrapped: make_optimizer(wrapped, OptimSettings()))
    for _ in range(2):
        with backend.accumulating(last=True):
            output = backend.model(torch.randn(4, 1, 4, 4, 4))
            backend.backward(output.float().square().mean())
        backend.update()
    state = {str(tensor.dtype) for tensor in backend.module.state_dict().values()}
    if backend.is_main:
        print("DTYPES", json.dumps({"computed": sorted(computed), "state": sorted(state)}))
    backend.close()
    # As the train command does.
    _leave_launch()


main()
