"""A process group of threads, so that ranks really meet in a test, and one of a single rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_train.distributed.process_group import ProcessGroup

#: A process alone.
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@dataclass
class Threads:
    """One rank of the group."""

    rank: int
    world: int
    barrier: threading.Barrier
    board: list[Any]
    device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(30)
        gathered = list(self.board)
        self.barrier.wait(30)
        return gathered

    def broadcast(self, tensor: Tensor, source: int) -> None:
        sent = self.gather(tensor)[source]
        if self.rank != source:
            tensor.copy_(sent)


def on_each_rank(world: int, act: Callable[[Threads], None]) -> list[Exception]:
    """Run ``act`` on every rank, and return what was raised."""
    barrier, board = threading.Barrier(world), [None] * world
    raised: list[Exception] = []

    def one(rank: int) -> None:
        try:
            act(Threads(rank, world, barrier, board))
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised
