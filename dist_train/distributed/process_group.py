"""The processes of a launch, and their collective calls. One process alone communicates nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.distributed.foreach import by_dtype


@dataclass(eq=False)
class ProcessGroup:
    """One process's view of the launch: its rank, the number of processes, and its device.

    All methods are collective calls.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each of a few numbers, in float64, on every rank."""
        if self.world == 1:
            # Without a tensor, for which this process would wait for its device.
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give every rank the values of rank ``source``, in place."""
        if self.world > 1:
            dist.broadcast(tensor, src=source)

    def sync(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values of rank 0, in place, by one broadcast for each dtype: for many
        small tensors."""
        if self.world == 1:
            return
        for same in by_dtype(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
            self.broadcast(flat, source=0)
            pieces = torch.split(flat, [tensor.numel() for tensor in same])
            with torch.no_grad():
                torch._foreach_copy_(
                    same, [piece.view(t.shape) for piece, t in zip(pieces, same, strict=True)]
                )


@contextmanager
def process_group(timeout: float, *, cuda: bool) -> Iterator[ProcessGroup]:
    """The processes that the launcher started; without a launcher, this process alone.

    After an error the group is not destroyed: NCCL would wait for collective calls of the other
    processes, and nobody would see the error.

    Args:
        timeout: seconds after which a process that waits for others gives up.
        cuda: communicate from this process's CUDA device, not from the CPU.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield ProcessGroup(rank, world, device)
    if world > 1:
        dist.destroy_process_group()
