"""Integrated gradients (Sundararajan, Taly & Yan 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Points on the way: at first, and at most.
STEPS, MOST_STEPS = 32, 256
#: Part of the score's change that the map's sum may lack.
TOLERANCE = 0.05


def integrated_gradients(
    model: nn.Module, clip: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """What each voxel adds to a score, on a straight way from an empty clip to the clip.

    The empty clip has, in each channel, the clip's mean everywhere: dark things count as bright
    ones do. The gradient is taken in the middles of equal steps, which are halved until the map is
    complete within ``TOLERANCE``, or there are ``MOST_STEPS``, or it is not finite.

    Args:
        model: in eval mode.
        clip: float32 [1, C, D, H, W], without padding.
        score: of the model's logits.

    Returns:
        float32 [D, H, W], summed over channels; and by how much its sum differs from the score's
        change, in parts of that (completeness, the method's axiom, has 0).
    """
    empty = clip.mean((2, 3, 4), keepdim=True)
    way = clip - empty
    with torch.no_grad():
        change = score(model(clip, None)) - score(model(empty + 0 * way, None))
    steps = STEPS
    while True:
        total = torch.zeros_like(clip)
        for step in range(steps):
            point = (empty + (step + 0.5) / steps * way).requires_grad_()
            total += torch.autograd.grad(score(model(point, None)), point)[0]
        parts = total * way / steps
        lacking = float((parts.double().sum() - change).abs() / change.abs().clamp(min=1e-6))
        if lacking <= TOLERANCE or steps >= MOST_STEPS or not math.isfinite(lacking):
            return parts[0].sum(0), lacking
        steps *= 2
