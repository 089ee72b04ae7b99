"""How long each process is at its own work, so that one which holds up the others is named."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch
from torch import nn

from dist_train.distributed.backends.base import Backend

log = logging.getLogger(__name__)

#: Steps that are looked at together before a process is called slow.
WINDOW = 20
#: Seconds before the same process is named again.
QUIET = 600.0


class StragglerDetector:
    """Own work is the wait for data and the forward passes of convolutions, where nearly all of the
    arithmetic is. It is not a step's whole time: as processes wait for each other in shared
    statistics, and within the backward pass for gradients, that is the slowest one's for all.

    Making one is a collective call.

    Args:
        slow: how many times the median's a process's work takes that is named in the log.
    """

    def __init__(self, backend: Backend, slow: float) -> None:
        self._backend, self._slow = backend, slow
        # Held-out clips are no part of a step.
        self._in_step = False
        self._own = 0.0
        self._began = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._used = 0
        self._recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: dict[int, float] = {}
        if backend.world > 1:
            self._hosts = backend.gather(socket.gethostname())
            for module in backend.module.modules():
                if isinstance(module, nn.Conv3d):
                    module.register_forward_pre_hook(self._before)
                    module.register_forward_hook(self._after)

    def begin(self) -> None:
        """A step begins, which ends with ``own_seconds``."""
        self._in_step, self._own, self._used = True, 0.0, 0

    def own_seconds(self, waited: float) -> list[float]:
        """Seconds of own work in this step in this process's place of a list of all of them, and 0
        in the others, so that the sum over the processes is the list of each one's.

        Args:
            waited: seconds for data.
        """
        self._in_step = False
        if self._backend.world == 1:
            return []
        for before, after in self._marks[: self._used]:
            after.synchronize()
            self._own += before.elapsed_time(after) / 1000
        self._used = 0
        mine = waited + self._own
        return [mine if r == self._backend.rank else 0.0 for r in range(self._backend.world)]

    def compare(self, seconds: Sequence[float]) -> dict[str, float | None]:
        """Say on rank 0 which process is slow, if one is.

        Args:
            seconds: of each process in this step; empty for a process alone.

        Returns:
            The slowest one's as multiple of the median's, by the metric's name.
        """
        if not seconds:
            return {}
        self._recent.append(seconds)
        if len(self._recent) == WINDOW and self._backend.is_main:
            self._name([sum(of_one) for of_one in zip(*self._recent, strict=True)])
        return {"speed/slowest_rank_ratio": _ratio(seconds)}

    def _name(self, seconds: list[float]) -> None:
        slowest = seconds.index(max(seconds))
        ratio, now = _ratio(seconds), time.monotonic()
        if ratio < self._slow or now - self._named.get(slowest, -QUIET) < QUIET:
            return
        self._named[slowest] = now
        log.warning(
            "process %d on %s is slow: over the last %d steps its own work took %.1f times as long "
            "as the median's (train.straggler_ratio), and all others wait for it",
            slowest,
            self._hosts[slowest],
            WINDOW,
            ratio,
        )

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if not self._in_step:
            return
        if self._backend.device.type != "cuda":
            self._began = time.perf_counter()
            return
        if self._used == len(self._marks):
            events = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._marks.append((next(events), next(events)))
        self._marks[self._used][0].record()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._in_step:
            return
        if self._backend.device.type != "cuda":
            self._own += time.perf_counter() - self._began
            return
        self._marks[self._used][1].record()
        self._used += 1


def _ratio(seconds: Sequence[float]) -> float:
    return max(seconds) / max(median_low(seconds), 1e-9)
