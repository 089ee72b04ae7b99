"""The whole network runs channels last: no operation reads or writes another layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import LAYOUT, Layouts

from dist_train.models.resnet3d import ResNet3D

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.slow
# Each two of these choices meet.
@pytest.mark.parametrize(
    ("frames", "folded", "recompute"),
    [
        ([32, 32], False, "none"),
        ([32, 32], True, "block"),
        ([32, 19], False, "block"),
        ([32, 19], True, "none"),
    ],
    ids=str,
)
def test_every_operation_is_in_one_layout_forward_and_backward(
    frames: list[int], folded: bool, recompute: Any
) -> None:
    torch.manual_seed(0)
    model = ResNet3D(50, width=4, stem_folded=folded, recompute=recompute)
    model = model.to(memory_format=LAYOUT)  # type: ignore[call-overload]
    # The smallest whose last activations are [2, C, 2, 2, 2].
    clips = torch.rand(2, 1, 32, 64, 64).to(memory_format=LAYOUT)
    with Layouts() as layouts:
        model(clips, torch.tensor(frames)).sum().backward()
    assert layouts.seen > 300
    # Folding one channel into four is a copy, of the input and of the kernel.
    assert layouts.wrong == (["clone"] * 2 * (1 + (recompute == "block")) if folded else [])


def test_a_contiguous_network_would_be_noticed() -> None:
    torch.manual_seed(0)
    model = ResNet3D(10, width=4)
    with Layouts() as layouts:
        model(torch.rand(2, 1, 32, 64, 64)).sum().backward()
    assert len(layouts.wrong) > 50
