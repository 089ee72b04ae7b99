"""Started by a launcher, with a config file: trains, and in the first session process 1 has no
memory for more than 4 clips from its 6th step on."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from dist_train.cli import _leave_launch
from dist_train.config import load_config
from dist_train.train import Trainer, train


def out_of_memory(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if module.training and len(inputs[0]) > 4:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")


def before_step(trainer: Trainer, step: int) -> None:
    if step == 5 and trainer.backend.rank == 1:
        trainer.backend.module.blocks[-1].register_forward_pre_hook(out_of_memory)


train(load_config(Path(sys.argv[1])), resume="auto", before_step=before_step)
_leave_launch()
