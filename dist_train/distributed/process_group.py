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
def process_group(timeout: float) -> Iterator[ProcessGroup]:
    """The processes that the launcher started; this one alone where there is no launcher.

    After an error the group is not left in order: the other processes may be in a collective call,
    for whose end NCCL would wait, and nobody would be told of the error.

    Args:
        timeout: seconds after which a process that waits for others gives up.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield ProcessGroup(rank, world, device)
    if world > 1:
        dist.destroy_process_group()
