"""Measure how long each process takes for its own work, and name one that slows down the others."""

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

#: Steps that are summed before a process is called slow.
WINDOW = 20
#: Seconds before the same process is named again.
QUIET = 600.0


class StragglerDetector:
    """Measures the wait for data and the forward passes of convolutions.

    A step's whole time is that of the slowest process for all, as processes wait for each other
    for shared statistics and for gradients. Convolutions are nearly all of the arithmetic.

    Construction is a collective call.

    Args:
        slow: name a process whose work takes this multiple of the median.
    """

    def __init__(self, backend: Backend, slow: float) -> None:
        self._backend, self._slow = backend, slow
        # Held-out clips are no part of a step.
        self._in_step = False
        self._own = self._began = 0.0
        # CUDA events around each convolution, reused in every step; ``_used`` of them in this one.
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._used = 0
        self._recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named_at: dict[int, float] = {}
        if backend.world > 1:
            self._hosts = backend.gather(socket.gethostname())
            for module in backend.module.modules():
                if isinstance(module, nn.Conv3d):
                    module.register_forward_pre_hook(self._before)
                    module.register_forward_hook(self._after)

    def begin(self) -> None:
        """Begin a step; ``own_seconds`` ends it."""
        self._in_step, self._own, self._used = True, 0.0, 0

    def own_seconds(self, waited: float) -> list[float]:
        """Seconds of own work in this step at this rank's place of a list, and 0 at the others: the
        sum over the ranks is the list of all ranks' seconds. Empty for a process alone.

        Args:
            waited: seconds for data.
        """
        self._in_step = False
        if self._backend.world == 1:
            return []
        for before, after in self._events[: self._used]:
            after.synchronize()
            self._own += before.elapsed_time(after) / 1000
        seconds = [0.0] * self._backend.world
        seconds[self._backend.rank] = waited + self._own
        return seconds

    def compare(self, seconds: Sequence[float]) -> dict[str, float | None]:
        """Log the slowest process on rank 0, if it is slow.

        Args:
            seconds: of each process in this step; empty for a process alone.

        Returns:
            The slowest process's seconds as a multiple of the median, by the metric's name.
        """
        if not seconds:
            return {}
        self._recent.append(seconds)
        if len(self._recent) == WINDOW and self._backend.is_main:
            self._warn([sum(of_one) for of_one in zip(*self._recent, strict=True)])
        return {"speed/slowest_rank_ratio": _ratio(seconds)}

    def _warn(self, seconds: list[float]) -> None:
        slowest = seconds.index(max(seconds))
        ratio, now = _ratio(seconds), time.monotonic()
        if ratio < self._slow or now - self._named_at.get(slowest, -QUIET) < QUIET:
            return
        self._named_at[slowest] = now
        log.warning(
            "process %d on %s is slow: over the last %d steps its own work took %.1f times as long "
            "as that of the median process (train.straggler_ratio), and all others wait for it",
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
        if self._used == len(self._events):
            events = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events.append((next(events), next(events)))
        self._events[self._used][0].record()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._in_step:
            return
        if self._backend.device.type != "cuda":
            self._own += time.perf_counter() - self._began
            return
        self._events[self._used][1].record()
        self._used += 1


def _ratio(seconds: Sequence[float]) -> float:
    return max(seconds) / max(median_low(seconds), 1e-9)
