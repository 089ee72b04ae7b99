"""Pooling by one kernel against torch's: the same bits, also backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from dist_train.models.fused_pool import fused_max_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pooled(x: Tensor, *, fused: bool) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input for a random one of the output."""
    x = x.clone().requires_grad_()
    y = fused_max_pool(x)[0] if fused else F.max_pool3d(x, 3, stride=2, padding=1)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(
    "shape", [(2, 5, 5, 6, 7), (1, 70, 1, 4, 3), (2, 3, 8, 8, 8), (1, 1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_it_is_torchs(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Also of equal values, of which the first counts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2).round()
    x = x.to(DEVICE, memory_format=layout)
    for ours, theirs in zip(pooled(x, fused=True), pooled(x, fused=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_what_is_not_finite_goes_through() -> None:
    x = torch.zeros(1, 2, 5, 5, 5, device=DEVICE)
    x[0, 0, 2, 2, 2] = float("nan")
    x[0, 1] = float("-inf")
    for ours, theirs in zip(pooled(x, fused=True), pooled(x, fused=False), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_byte_for_each_output_is_kept() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.rand(1, 2, 4, 6, 6, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, taps = fused_max_pool(x)
    assert [tensor.dtype for tensor in kept] == [torch.uint8]
    assert taps.shape == y.shape == (1, 2, 2, 3, 3)
