"""The convolution against a sum of shifted products, which uses no library convolution."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.layers import Conv3d, FoldedConv3d, global_average_pool
from dist_train.models.padding import valid_frames


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
    check_output_and_gradients(kernel, stride, (depth, 4, 4), precision, layout)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 5), (5, 3, 1), (9, 2, 1)], ids=str)
def test_output_and_gradients_of_few_pixels(
    size: tuple[int, int, int], precision: torch.dtype
) -> None:
    check_output_and_gradients(3, 2, size, precision, torch.channels_last_3d)


def check_output_and_gradients(
    kernel: int,
    stride: int,
    size: tuple[int, int, int],
    precision: torch.dtype,
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(size[0] * 10 + kernel)
    conv = Conv3d(16, 16, kernel, stride, padding=kernel // 2, bias=False)
    conv = conv.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 16, *size).to(memory_format=layout).requires_grad_()
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


def random_features() -> torch.Tensor:
    return torch.randn(3, 4, 6, 2, 5, generator=torch.Generator().manual_seed(0))


def test_without_padding_it_is_the_mean():
    x = random_features()
    torch.testing.assert_close(global_average_pool(x), x.flatten(2).mean(dim=2))


def test_padded_frames_do_not_count():
    x = random_features()
    frames = torch.tensor([6, 1, 4])
    expected = torch.stack([x[b, :, :n].mean(dim=(1, 2, 3)) for b, n in enumerate(frames)])
    valid = valid_frames(frames, x)
    torch.testing.assert_close(global_average_pool(x, valid), expected)

    x[1, :, 1:] = float("nan")
    x[2, :, 4:] = 1e30
    torch.testing.assert_close(global_average_pool(x, valid), expected)


def test_bfloat16_is_averaged_in_float32_and_float64_stays():
    x = random_features().bfloat16()
    valid = valid_frames(torch.tensor([6, 1, 4]), x)
    assert torch.equal(global_average_pool(x, valid), global_average_pool(x.float(), valid))
    assert torch.equal(global_average_pool(x), global_average_pool(x.float()))
    assert global_average_pool(x.double(), valid).dtype == torch.float64


# The folded convolution against the plain one: other sums, the same numbers.


LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 16), (1, 7, 9), (5, 6, 11)], ids=str)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(
    shape: tuple[int, int, int], stride: tuple[int, int, int], layout: torch.memory_format
) -> None:
    """In float64, with rounding of 1e-16."""
    torch.manual_seed(0)
    results = []
    plain = Conv3d(2, 3, 7, stride, padding=3, bias=False)
    folded = FoldedConv3d(2, 3, 7, stride, padding=3, bias=False)
    folded.load_state_dict(plain.state_dict())
    clips = torch.randn(2, 2, *shape, dtype=torch.float64)
    for conv in (plain, folded):
        conv.double().to(memory_format=layout)  # type: ignore[call-overload]
        x = clips.clone(memory_format=layout).requires_grad_()
        y = conv(x)
        y.square().sum().backward()
        results.append((y, x.grad, conv.weight.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_shallow_clips_in_bfloat16_get_right_gradients() -> None:
    """oneDNN's unwritten memory (see layers.py) would be far outside of the tolerance."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 3, 16, 16)
    grads = []
    for make, enabled in ((Conv3d, False), (FoldedConv3d, True)):
        torch.manual_seed(1)
        conv = make(1, 16, 7, (1, 2, 2), padding=3, bias=False)
        for _ in range(4):
            torch.full((1 << 18,), float("nan"))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            conv(x).float().mean(dim=(2, 3, 4)).square().sum().backward()
        assert conv.weight.grad is not None
        grads.append(conv.weight.grad)
    assert (grads[1] - grads[0]).abs().max() <= 5e-2 * grads[0].abs().max()
