"""The learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_train.config import ScheduleSettings


@dataclass(frozen=True)
class Schedule:
    """``lr(step)`` for steps 0 to ``steps`` - 1 of a run of ``epochs`` epochs.

    After a linear warm-up to ``peak``, "cosine" (Loshchilov & Hutter 2017, one cycle) falls to
    ``min_lr``; "oscillating" swings between the two rates in whole cosine waves, after the
    original recipe.
    """

    settings: ScheduleSettings
    peak: float
    steps: int
    epochs: int

    def lr(self, step: int) -> float:
        warmup = self._warmup
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        low = min(self.settings.min_lr, self.peak)
        return low + (self.peak - low) * (1 + math.cos(math.pi * self._phase(step))) / 2

    def minima(self) -> list[int]:
        """Return the steps after which the rate is at a minimum, and the last step; ascending."""
        last = self.steps - 1
        if self.settings.name == "cosine":
            return [last]
        waves = math.floor((last - self._warmup) / self._wave + 0.5)
        inner = {round(self._warmup + (k + 0.5) * self._wave) for k in range(waves)}
        return sorted({step for step in inner if step < last} | {last})

    @property
    def _warmup(self) -> int:
        """Steps of the warm-up."""
        return min(round(self.settings.warmup_epochs * self.steps / self.epochs), self.steps - 1)

    @property
    def _wave(self) -> float:
        """Steps of a wave."""
        return max(self.settings.period * self.steps / self.epochs, 1.0)

    def _phase(self, step: int) -> float:
        """Return the time since the warm-up in half waves: 0 at a peak, 1 at a minimum."""
        if self.settings.name == "oscillating":
            return 2 * (step - self._warmup) / self._wave
        return (step - self._warmup) / max(self.steps - 1 - self._warmup, 1)
