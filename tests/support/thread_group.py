"""A process group of threads, so that ranks really meet in a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Threads:
    """One rank of it."""

    rank: int
    world: int
    barrier: threading.Barrier
    board: list[Any]

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(30)
        gathered = list(self.board)
        self.barrier.wait(30)
        return gathered


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
