"""The folded convolution against the plain one: other sums, the same numbers."""

from __future__ import annotations

import pytest
import torch

from dist_train.models.conv import Conv3d
from dist_train.models.resnet3d import ResNet3D
from dist_train.models.space_to_depth import FoldedConv3d

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 16), (1, 7, 9), (5, 6, 11)], ids=str)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(
    shape: tuple[int, int, int], stride: tuple[int, int, int], layout: torch.memory_format
) -> None:
    """In float64, where rounding is 1e-16."""
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_has_the_layout_of_the_network(layout: torch.memory_format) -> None:
    conv = FoldedConv3d(1, 8, 7, (1, 2, 2), padding=3, bias=False)
    conv = conv.to(memory_format=layout)  # type: ignore[call-overload]
    assert conv(torch.rand(2, 1, 8, 16, 16)).is_contiguous(memory_format=layout)


def test_shallow_clips_in_bfloat16_get_right_gradients() -> None:
    """See conv.py: what oneDNN leaves unwritten would be far outside of this."""
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


def test_a_network_trains_alike_and_shares_its_weights_with_the_plain_one() -> None:
    runs = []
    for folded in (False, True):
        torch.manual_seed(0)
        model = ResNet3D(10, width=4, stem_folded=folded).double()
        x = torch.rand(2, 1, 8, 32, 32, dtype=torch.float64, generator=torch.Generator())
        logits = model(x, torch.tensor([8, 5]))
        logits.square().sum().backward()
        runs.append((model.state_dict(), logits, [p.grad for p in model.parameters()]))
    plain, folded_run = runs
    assert {name: t.shape for name, t in plain[0].items()} == {
        name: t.shape for name, t in folded_run[0].items()
    }
    for ours, theirs in zip(folded_run[2], plain[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(folded_run[1], plain[1], rtol=1e-9, atol=1e-12)
