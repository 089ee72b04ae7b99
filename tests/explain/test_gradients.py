"""Integrated gradients: exact where the answer is known, and complete everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.explain.gradients import STEPS, TOLERANCE, integrated_gradients
from dist_train.models.registry import build_model


class Weighted(nn.Module):
    """A sum of the clip's values with weights, and its square."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, volumes: Tensor, frames: Tensor | None) -> Tensor:
        found = (volumes * self.weights).sum((1, 2, 3, 4))
        return found + found**2


def first(logits: Tensor) -> Tensor:
    return logits.reshape(-1)[0]


def test_of_a_linear_model_it_is_weight_times_distance_from_the_mean() -> None:
    torch.manual_seed(0)
    clip, weights = torch.rand(1, 2, 3, 4, 5), torch.randn(1, 2, 3, 4, 5)
    model = Weighted(weights)
    found, gap = integrated_gradients(model, clip, first)
    way = clip - clip.mean((2, 3, 4), keepdim=True)
    # The derivative of f + f^2 along the way, on average, is 1 + f(start) + f(end).
    ends = [float((x * weights).sum()) for x in (clip - way, clip)]
    torch.testing.assert_close(found, ((1 + sum(ends)) * weights * way)[0].sum(0))
    assert gap < 1e-3


def test_it_stops_where_a_gradient_is_not_finite() -> None:
    calls: list[float] = []

    def root(logits: Tensor) -> Tensor:
        calls.append(float(logits.detach()))
        # Infinite times 0.
        return (0 * logits.reshape(-1)[0]).sqrt()

    found, gap = integrated_gradients(Weighted(torch.ones(1)), torch.rand(1, 1, 2, 3, 4), root)
    assert len(calls) == STEPS + 2
    assert not torch.isfinite(found).any()
    assert gap != gap


@pytest.mark.parametrize("name", ["resnet3d-10", "x3d-s", "convnext3d-tiny"])
def test_the_map_adds_up_to_the_change_of_the_score(name: str) -> None:
    torch.manual_seed(1)
    model = build_model(name, width=8).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".scale"):
            nn.init.constant_(parameter, 0.3)
    clip = torch.rand(1, 1, 5, 32, 32)
    found, gap = integrated_gradients(model, clip, first)
    with torch.no_grad():
        change = first(model(clip, None)) - first(model(clip * 0 + clip.mean(), None))
    assert gap <= TOLERANCE
    assert abs(float(found.sum() - change)) <= 1.01 * TOLERANCE * abs(float(change))
    assert found.shape == (5, 32, 32)
