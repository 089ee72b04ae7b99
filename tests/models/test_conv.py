"""The convolution against an own sum of shifted products, which no library's bug can reach."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.conv import Conv3d


def by_hand(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """3D convolution in float64 as a sum over kernel places, zero-padded by half the kernel."""
    k = weight.shape[-1]
    padded = F.pad(x, (k // 2,) * 6)
    depth, height, width = ((n - 1) // stride + 1 for n in x.shape[2:])
    out = torch.zeros(())
    for d, h, w in itertools.product(range(k), repeat=3):
        window = padded[:, :, d:, h:, w:][:, :, ::stride, ::stride, ::stride]
        window = window[:, :, :depth, :height, :width]
        out = out + torch.einsum("bcdhw,oc->bodhw", window, weight[:, :, d, h, w])
    return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "depth"),
    [
        *itertools.product((1, 3), (1, 2, 3, 5, 7, 8)),
        *((7, depth) for depth in (1, 3, 8)),
        # The sum of 343 products takes a second.
        *(pytest.param(7, depth, marks=pytest.mark.soak) for depth in (2, 5, 7)),
    ],
)
def test_output_and_gradients_at_any_depth(
    depth: int, kernel: int, stride: int, precision: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(depth * 10 + kernel)
    conv = Conv3d(16, 16, kernel, stride, padding=kernel // 2, bias=False)
    conv = conv.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 16, depth, 4, 4).to(memory_format=layout).requires_grad_()
    # What the library leaves unwritten shows best where memory held something before.
    for _ in range(4):
        torch.full((1 << 18,), float("nan"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        out = conv(x)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    exact_x = x.detach().double().requires_grad_()
    exact_weight = conv.weight.detach().double().requires_grad_()
    exact = by_hand(exact_x, exact_weight, stride)
    exact.backward(upstream.double())

    # Where the CPU has no bfloat16 instructions, sums too are rounded to bfloat16 on the way.
    tolerance = 1e-5 if precision is torch.float32 else 5e-2
    assert conv.weight.grad is not None
    assert x.grad is not None
    assert exact_weight.grad is not None
    assert exact_x.grad is not None
    for ours, theirs in (
        (out, exact),
        (conv.weight.grad, exact_weight.grad),
        (x.grad, exact_x.grad),
    ):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_deep_clips_take_the_plain_path() -> None:
    conv = Conv3d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 3, 5, 5)
    assert torch.equal(conv(x), nn.Conv3d.forward(conv, x))
