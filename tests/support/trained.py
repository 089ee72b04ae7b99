"""A rank's program: trains like the command, and records what really runs.

    trained.py [--resume auto] [--kill-in STEP] key=value...

Before the last step each rank writes ``rank-R.json`` beside the run: the backend's engine, and how
much of weights and moments this rank has. With ``--kill-in`` SIGKILL ends every rank in the forward
pass of the last micro-batch of that step (1 is the first).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from timm_stand_in import import_timm
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.cli import _leave_launch
from dist_train.config import load_config
from dist_train.distributed.backends.base import Backend
from dist_train.training.train import train
from dist_train.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", choices=("never", "auto"), default="never")
    parser.add_argument("--kill-in", type=int)
    parser.add_argument("settings", nargs="+")
    arguments = parser.parse_args()
    config = load_config(None, arguments.settings)
    if config.model.name.startswith("frames-"):
        import_timm()

    def before_step(trainer: Trainer, step: int) -> None:
        if arguments.kill_in == step + 1:
            kill_in_micro_batch(trainer.backend.module, config.train.accumulate)
        if step == trainer.steps - 1:
            facts = facts_of(trainer.backend)
            place = Path(f"{config.out}-facts")
            place.mkdir(exist_ok=True)
            (place / f"rank-{trainer.backend.rank}.json").write_text(json.dumps(facts))

    train(config, resume=arguments.resume, before_step=before_step)
    # As the command does.
    _leave_launch()


def kill_in_micro_batch(module: nn.Module, number: int) -> None:
    calls = iter(range(1, number))

    def count(*_: object) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    module.register_forward_pre_hook(count)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def facts_of(backend: Backend) -> dict[str, Any]:
    zero = backend.settings.backend.startswith("zero")
    model: Any = backend.model
    optimizer: Any = model.optimizer if zero else backend.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    moments = [local(state["exp_avg"]) for state in states if "exp_avg" in state]
    # ZeRO-3 keeps its shard beside the parameter.
    weights = [local(getattr(p, "ds_tensor", p)) for _, p in backend.trained()]
    return {
        "engine": type(model).__name__,
        "stage": backend.model.zero_optimization_stage() if zero else 0,
        "partitions_gradients": bool(
            zero and backend.model.zero_optimization_partition_gradients()
        ),
        # By which dropout was drawn in the step before.
        "seed": torch.initial_seed(),
        "offloads": bool(zero and backend.model.zero_offload_optimizer() is not None),
        "dtypes": sorted({str(t.dtype) for t in [*moments, *weights]}),
        "parameters": sum(backend.numels[name] for name, _ in backend.trained()),
        "weights_held": sum(tensor.numel() for tensor in weights),
        "moments_held": sum(tensor.numel() for tensor in moments),
    }


main()
