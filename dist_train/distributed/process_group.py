"""The processes of a launch that compute each by itself, and meet to put their results together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_train.config import TrainSettings
from dist_train.distributed.device import chosen_cuda


@dataclass
class ProcessGroup:
    """One process's view of the launch: its rank, the number of processes, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from every rank, in rank order, on every rank. A collective call."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered


@contextmanager
def process_group(settings: TrainSettings) -> Iterator[ProcessGroup]:
    """The processes that the launcher started; without a launcher, this process alone.

    After an error the group is not destroyed: NCCL would wait for collective calls of the other
    processes, and nobody would see the error.

    Raises:
        BackendError: as ``chosen_cuda``.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if chosen_cuda(settings):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout))
    yield ProcessGroup(rank, world, device)
    if world > 1:
        dist.destroy_process_group()
