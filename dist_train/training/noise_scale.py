"""The gradient noise scale: from which size on larger batches bring little."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Share of the averages that a step keeps.
DECAY = 0.95


class NoiseScale:
    """The simple noise scale, tr(S) / |G|^2 in clips, of McCandlish, Kaplan, Amodei et al., "An
    empirical model of large-batch training" (2018), estimated by appendix A.1.

    The norms of the gradients of b and B clips have the expectations |G|^2 + tr(S) / b and
    |G|^2 + tr(S) / B, which gives unbiased estimates of both terms. Each is averaged over the
    steps, as a quotient of single estimates would be biased. Part of the checkpointed state.
    """

    def __init__(self) -> None:
        self._noise = self._signal = 0.0

    def update(self, small: tuple[float, float], large: tuple[float, float]) -> float | None:
        """Include a step, and return the noise scale; None while the signal's estimate is not
        positive.

        Args:
            small: clips of a micro-batch, and the square of its gradient's norm.
            large: clips of the step, and the square of its gradient's norm.
        """
        (b, of_small), (big, of_large) = small, large
        signal = (big * of_large - b * of_small) / (big - b)
        noise = (of_small - of_large) / (1 / b - 1 / big)
        self._noise = DECAY * self._noise + (1 - DECAY) * noise
        self._signal = DECAY * self._signal + (1 - DECAY) * signal
        return self._noise / self._signal if self._signal > 0 else None

    def state(self) -> list[float] | None:
        """JSON types; None before the first step."""
        return [self._noise, self._signal] if self._noise or self._signal else None

    def load(self, state: Any) -> None:
        """Restore ``state``; begin anew without one."""
        self._noise, self._signal = state or (0.0, 0.0)


def squared_norm(module: nn.Module) -> Tensor:
    """Sum of the squares of all gradients, float32 [], on their device."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.stack(list(torch._foreach_norm(gradients))).square().sum()
