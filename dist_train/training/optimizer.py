"""AdamW, with weight decay on weights only, unless it is asked for on all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from dist_train.config import OptimSettings, ScheduleSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019). Biases and BatchNorm's scales, which have one axis, are not
    decayed unless ``settings.decay`` is "all": they set no capacity, and decaying them only shrinks
    the signal."""
    trained = [p for p in model.parameters() if p.requires_grad]
    of_vectors = settings.weight_decay if settings.decay == "all" else 0.0
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": of_vectors},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, fused=True if settings.fused else None
    )


# Schedules of the learning rate.


@dataclass(frozen=True)
class Schedule:
    """``lr(step)`` for steps 0 to ``steps`` - 1 of a run of ``epochs`` epochs, peaking at ``peak``.

    "cosine" (Loshchilov & Hutter 2017, one cycle) ends at ``min_lr``; "oscillating" swings between
    the two rates in whole cosine waves, after the original recipe.
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
        """Steps after which the rate is at a minimum, and the last step; ascending."""
        last = self.steps - 1
        if self.settings.name == "cosine":
            return [last]
        waves = math.floor((last - self._warmup) / self._wave + 0.5)
        inner = {round(self._warmup + (k + 0.5) * self._wave) for k in range(waves)}
        return sorted({step for step in inner if step < last} | {last})

    @property
    def _warmup(self) -> int:
        return min(round(self.settings.warmup_epochs * self.steps / self.epochs), self.steps - 1)

    @property
    def _wave(self) -> float:
        return max(self.settings.period * self.steps / self.epochs, 1.0)

    def _phase(self, step: int) -> float:
        """In half waves: 0 at a peak, 1 at a minimum, 2 at the next peak."""
        if self.settings.name == "oscillating":
            return 2 * (step - self._warmup) / self._wave
        return (step - self._warmup) / max(self.steps - 1 - self._warmup, 1)
