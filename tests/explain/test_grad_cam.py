"""Grad-CAM: by hand, at the right place, and of every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm_stand_in import import_timm
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.explain.grad_cam import grad_cam
from dist_train.models.registry import build_model
from dist_train.models.resnet3d import ResNet3D

import_timm()


def first(logits: Tensor) -> Tensor:
    return logits.reshape(-1)[0]


class Pooled(nn.Module):
    """Layers, the mean, and a linear layer."""

    def __init__(self, *layers: nn.Module, channels: int = 1) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(channels, 1)

    def forward(self, volumes: Tensor, frames: Tensor | None) -> Tensor:
        found: Tensor = self.head(self.layers(volumes).mean((2, 3, 4))).squeeze(1)
        return found


def test_it_is_the_positive_part_of_the_weighted_channels() -> None:
    torch.manual_seed(0)
    model = Pooled(nn.Conv3d(1, 3, 1), channels=3).eval()
    clip = torch.rand(1, 1, 4, 5, 6)
    # The gradient of the mean is the head's weight over the number of voxels.
    channels = model.layers(clip)[0]
    expected = (model.head.weight[0, :, None, None, None] / 120 * channels).sum(0).relu()
    found = grad_cam(model, clip, first)
    torch.testing.assert_close(found, expected)
    assert 0 < float((found > 0).float().mean()) < 1


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_spot_is_where_it_was(kernel: int) -> None:
    """Behind three layers that halve height and width, by odd and by even kernels."""
    kernels, strides = (1, kernel, kernel), (1, 2, 2)
    padding = (0, kernel // 2, kernel // 2) if kernel % 2 else 0
    layers = [nn.AvgPool3d(kernels, strides, padding) for _ in range(3)]
    model = Pooled(*layers).eval()
    nn.init.ones_(model.head.weight)
    clip = torch.zeros(1, 1, 3, 64, 64)
    if kernel % 2:
        clip[:, :, 1, 40, 24] = 1
        centre = 40.0, 24.0
    else:
        clip[:, :, 1, 40:48, 24:32] = 1
        centre = 43.5, 27.5
    found = grad_cam(model, clip, first)
    assert found.sum((1, 2)).argmax() == 1
    mass = found[1] / found[1].sum()
    place = torch.arange(64.0)
    assert float((mass.sum(1) * place).sum()) == pytest.approx(centre[0], abs=0.01)
    assert float((mass.sum(0) * place).sum()) == pytest.approx(centre[1], abs=0.01)


SMALL: dict[str, dict[str, Any]] = {
    "resnet3d-10": {"width": 4},
    "resnet3d-50": {"width": 4},
    "r2plus1d-18": {"width": 4},
    "x3d-s": {"width": 8},
    "mobilenet3d": {"width": 0.25},
    "convnext3d-tiny": {"width": 8},
    "frames-lstm": {"encoder": "test_resnet", "hidden": 32},
    "frames-transformer": {"encoder": "test_convnext", "hidden": 32},
    "densenet3d-121": {},
    "monai.ResNet": {
        "block": "basic",
        "layers": (1, 1, 1, 1),
        "block_inplanes": (4, 8, 16, 32),
    },
}
SLOW = ("densenet3d-121",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SMALL]
)
def test_every_family_has_a_layer_for_it(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, **SMALL[name]).eval().requires_grad_(False)
    clip = torch.rand(1, 1, 6, 64, 48)
    found = grad_cam(model, clip, first) + grad_cam(model, clip, lambda x: -first(x))
    assert found.shape == (6, 64, 48)
    assert torch.isfinite(found).all()
    assert float(found.max()) > 0
    # Not one number for each frame.
    assert float(found.std((1, 2)).max()) > 0


def test_the_last_large_layer_is_taken_without_a_trace() -> None:
    """Of frames of 32 x 32, layers 2 to 4 of a ResNet have 4 x 4, 2 x 2 and 1 x 1 cells."""
    torch.manual_seed(0)
    model = ResNet3D(10, width=4).eval()
    seen: list[Tensor] = []
    hook = model.blocks[1].register_forward_hook(lambda *a: seen.append(a[2]))
    clip = torch.rand(1, 1, 5, 32, 32)
    found = grad_cam(model, clip, first)
    hook.remove()
    assert tuple(seen[0].shape[-2:]) == (4, 4)
    # Linear between cells 8 voxels apart, and level behind the last.
    torch.testing.assert_close(found[:, :, 24:], found[:, :, 24:25].expand(-1, -1, 8))
    torch.testing.assert_close(2 * found[:, :, 4], found[:, :, 0] + found[:, :, 8])
    assert not any(module._forward_hooks for module in model.modules())


class WithShortcut(nn.Module):
    """A block that halves its input by a branch of two layers and by a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)) + x[:, :, ::2, ::2, ::2]


def test_layers_that_a_shortcut_passes_by_are_not_taken() -> None:
    torch.manual_seed(0)
    model = Pooled(nn.Conv3d(1, 1, 1), WithShortcut()).eval()
    # The output of the block is too small, and its inner layer is not all that there is.
    clip = torch.rand(1, 1, 2, 6, 6)
    ahead = model.layers[0](clip)
    ahead.retain_grad()
    first(model.head(model.layers[1](ahead).mean((2, 3, 4)))).backward()
    expected = (ahead.grad.mean() * ahead)[0, 0].relu()
    torch.testing.assert_close(grad_cam(model, clip, first), expected)


def test_a_model_of_tokens_is_refused() -> None:
    model = build_model("frames-mean", encoder="test_vit").eval()
    with pytest.raises(ModelError, match="integrated-gradients"):
        grad_cam(model, torch.rand(1, 1, 3, 32, 32), first)
