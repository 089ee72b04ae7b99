"""Networks of other libraries: their own logits without padding, and the same ones with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.extensions import ALLOW
from dist_train.models.adapted import Adapted
from dist_train.models.norm import BatchNorm3d
from dist_train.models.registry import build_model

#: A DenseNet of few layers.
TINY = {"init_features": 4, "growth_rate": 2, "block_config": (2, 2), "bn_size": 2}


class Net(nn.Module):
    """Layers that cut clips short, by an even and by an odd kernel, and pooling of each kind."""

    def __init__(self, in_channels: int, num_classes: int, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(in_channels, 4, 3),
            nn.BatchNorm3d(4),
            nn.SiLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(4, 4, (4, 1, 1), padding=(2, 0, 0), stride=(3, 1, 1)),
            nn.AvgPool3d(3, 1, 1, count_include_pad=False),
            nn.AvgPool3d(2, 1),
            nn.AvgPool3d(3, 2, 1),
            extra or nn.Identity(),
        )
        self.mean, self.most = nn.AdaptiveAvgPool3d(1), nn.AdaptiveMaxPool3d((1, 1, 1))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.head(torch.cat([self.mean(x), self.most(x)], dim=1).flatten(1))


class Flipped(nn.Module):
    """Mixes frames between its layers."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, num_classes, 3, padding=1)
        self.mean = nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(self.conv(x.cumsum(2) + x.flip(2))).flatten(1)


class FlippedToZero(Flipped):
    """Its logits are 0 for every clip, until it is trained."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        nn.init.zeros_(self.conv.weight)


class Branched(Flipped):
    """Two branches of equal depth and, for some clips, unequal real frames."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.pool = nn.MaxPool3d(2)
        self.halve = nn.Conv3d(in_channels, num_classes, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled, halved = self.conv(self.pool(x)), self.halve(x)
        return self.mean(pooled).flatten(1) + self.mean(halved).flatten(1)


class Flat(Flipped):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1) @ torch.ones(7, 1, dtype=x.dtype)


class Halved(Flipped):
    def forward(self, x: Tensor) -> Tensor:
        return self.mean(self.conv(x[:, :, ::2])).flatten(1)


def with_layer(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    def build(in_channels: int, num_classes: int) -> nn.Module:
        return Net(in_channels, num_classes, make())

    return build


def test_without_padding_it_is_the_network_itself() -> None:
    torch.manual_seed(0)
    theirs = DenseNet(spatial_dims=3, in_channels=2, out_channels=3, **TINY)
    ours = Adapted(DenseNet, in_channels=2, outputs=3, **TINY)
    ours.net.load_state_dict(theirs.state_dict())
    assert ours.net.state_dict().keys() == theirs.state_dict().keys()
    clips = torch.rand(3, 2, 21, 32, 32)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        expected, logits = theirs(clips), ours(clips, torch.tensor([21, 21, 21]))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for value, other in zip(ours.net.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, BatchNorm3d) for module in ours.modules())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_clip_of_any_depth_is_the_same_in_any_batch(training: bool) -> None:
    """Also of fewer frames than a kernel has."""
    torch.manual_seed(0)
    model = Adapted(Net, outputs=2).double()
    lengths = [1, 2, 3, 5, 8, 13, 14, 15]
    clips = torch.rand(len(lengths), 1, 15, 20, 20, dtype=torch.float64)
    results = []
    for depth, fill in ((15, 0.0), (22, float("nan"))):
        batch = torch.full((len(lengths), 1, depth, 20, 20), fill, dtype=torch.float64)
        for row, clip, n in zip(batch, clips, lengths, strict=True):
            row[:, :n] = clip[:, :n]
        model.zero_grad()
        logits = model.train(training)(batch, torch.tensor(lengths))
        assert logits.dtype == torch.float64
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
    if not training:
        with torch.no_grad():
            alone = [model(clip[None, :, :n]) for clip, n in zip(clips, lengths, strict=True)]
        torch.testing.assert_close(torch.cat(alone).double(), results[0][0].double())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (with_layer(lambda: nn.InstanceNorm3d(4)), r"layers.8 \(InstanceNorm3d\) may mix frames"),
        (with_layer(lambda: nn.MultiheadAttention(4, 1)), "MultiheadAttention. may mix frames"),
        (with_layer(lambda: nn.MaxPool3d(2, ceil_mode=True)), "MaxPool3d. has ceil_mode"),
        (with_layer(lambda: nn.AdaptiveAvgPool3d((2, 1, 1))), "and not whole clips"),
        (with_layer(lambda: nn.Conv3d(4, 4, 3, padding="same")), "pads by zeros same"),
        (with_layer(lambda: nn.BatchNorm3d(4, affine=False)), "has no weights"),
        (Flipped, "padded frames change what Flipped predicts"),
        (FlippedToZero, "padded frames change what FlippedToZero predicts"),
        (Branched, "and so does another layer"),
        (Flat, "Flat does not take clips of 11 and 19 frames"),
        (Halved, "gets 10 frames, which no layer before it made"),
        (nn.Linear, "constructor of Linear has none of in_channels"),
    ],
)
def test_what_would_see_padding_is_refused_by_name(
    make: Callable[..., nn.Module], told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        Adapted(make)


def test_networks_come_by_monais_name_and_by_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = torch.rand(2, 1, 9, 32, 32)
    model = build_model("monai.DenseNet", **TINY)
    assert model(clips, torch.tensor([9, 4])).shape == (2,)
    with pytest.raises(ModelError, match="MONAI has no network DenseNet12"):
        build_model("monai.DenseNet12")
    with pytest.raises(ModelError, match="unexpected keyword argument 'depth'"):
        build_model("monai.DenseNet", depth=3)
    module = ModuleType("mylab")
    vars(module)["Net"] = type("Net", (Net,), {"__module__": "mylab"})
    monkeypatch.setitem(sys.modules, "mylab", module)
    monkeypatch.setenv(ALLOW, "mylab")
    assert build_model("mylab:Net", outputs=3)(clips, None).shape == (2, 3)
