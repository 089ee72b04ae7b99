"""A trial of the largest micro-batch before training, to see whether memory suffices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dist_train.config import Config
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.out_of_memory import free_cache, is_out_of_memory
from dist_train.run.model import as_input
from dist_train.system.advice import first_line
from dist_train.training.teacher import Teacher

#: Share of the device's memory that the trial leaves free, for fragments and communication buffers.
MARGIN = 1 / 20
#: Memory in sizes of the weights, besides weights and gradients: AdamW's two moments, and the
#: buckets in which gradients are exchanged.
COPIES = 3


def find_shortage(
    make: Callable[[], nn.Module],
    clips: int,
    frames: int,
    config: Config,
    backend: Backend,
    teacher: Teacher | None = None,
) -> str | None:
    """Try both passes of ``clips`` clips of ``frames`` frames, without a trace in the run.

    Args:
        make: makes a model that does not communicate with other ranks.
        teacher: is asked before the model.

    Returns:
        The error if memory did not suffice, else None.
    """
    device = backend.device
    shortage = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _train_once(make(), clips, frames, config, backend, teacher)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        shortage = first_line(error)
    # Not in the handler: the traceback keeps tensors alive.
    free_cache(device)
    return shortage


def _train_once(
    model: nn.Module,
    clips: int,
    frames: int,
    config: Config,
    backend: Backend,
    teacher: Teacher | None,
) -> None:
    device = backend.device
    model.to(device).train()
    reserved = COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        reserved += int(torch.cuda.get_device_properties(device).total_memory * MARGIN)
    reserve = torch.empty(reserved, dtype=torch.uint8, device=device)
    shape = (clips, config.model.in_channels, frames, *config.clip.size)
    volumes = torch.zeros(shape, dtype=torch.uint8, device=device)
    # One clip is padded, as a padded batch takes more memory than another.
    lengths = torch.full((clips,), frames)
    lengths[0] = max(1, frames - 1)
    x = as_input(volumes, config)
    if teacher is not None:
        teacher(x, lengths)
    with backend.autocast():
        loss = model(x, lengths).float().mean()
    loss.backward()
    del reserve
