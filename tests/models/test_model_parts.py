"""Parts of a network, and what freezing them means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dist_train.errors import ModelError
from dist_train.models.norm import norms
from dist_train.models.norm_statistics import by_running_and_own_statistics, precise_statistics
from dist_train.models.parts import freeze, head_of, parts_of
from dist_train.models.resnet3d import ResNet3D

Make = Callable[..., ResNet3D]


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(4, 1, 8, 16, 16, generator=generator), torch.tensor([8, 5, 8, 3])


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_parts_of_a_resnet_are_in_order_and_complete(make_model: Make) -> None:
    model = make_model(18, width=4)
    parts = parts_of(model)
    assert tuple(parts) == ("stem", "layer1", "layer2", "layer3", "layer4", "head")
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(name.startswith(("blocks.2.", "blocks.3.")) for name in parts["layer2"])


def test_the_parts_of_another_model_are_its_children() -> None:
    net = nn.Module()
    net.embed = nn.Linear(1, 1)
    net.layers = nn.ModuleList([nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)])
    net.scale = nn.Parameter(torch.ones(1))
    assert list(parts_of(net)) == ["scale", "embed", "layers.0", "layers.2"]
    assert head_of(net) == "layers.2"
    assert head_of(nn.ModuleDict({"net": net})) == "layers.2"
    net.last = nn.Conv3d(1, 1, 1)
    with pytest.raises(ModelError, match=r"no part called head.*Its parts are scale, embed"):
        head_of(net)


def test_a_module_with_one_child_has_its_parts(make_model: Make) -> None:
    """Such as a network of another library within an adapter."""
    model = nn.ModuleDict({"net": make_model(10, width=4)})
    freeze(model, ["all but head"])
    assert trained_names(model) == {"net.head.weight", "net.head.bias"}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["stem", "layer1", "layer2", "layer3"], ("blocks.3.", "head.")),
        (["all but head"], ("head.",)),
        (["blocks.*"], ("stem.", "head.")),
        (["*"], None),
    ],
)
def test_what_is_frozen(make_model: Make, patterns: list[str], left: tuple[str, ...]) -> None:
    model = make_model(10, width=4)
    if left is None:
        with pytest.raises(ModelError, match="no parameter is left to train"):
            freeze(model, patterns)
        return
    freeze(model, patterns)
    assert trained_names(model) == {n for n, _ in model.named_parameters() if n.startswith(left)}
    model.train()
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm3d):
            assert norm.training == name.startswith(left)


def test_a_pattern_of_nothing_is_refused(make_model: Make) -> None:
    with pytest.raises(ModelError, match=r"'layer5' is no part.*parts: stem, layer1, .*, head\."):
        freeze(make_model(10, width=4), ["layer5"])


def test_statistics_of_torchs_norm_cannot_be_kept() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Conv3d(2, 2, 1))
    freeze(net, ["0"])
    with pytest.raises(ModelError, match=r"1 is torch's BatchNorm3d"):
        freeze(net, ["1"])
    freeze(net, ["1"], "none")


@pytest.mark.parametrize("norms_frozen", ["parts", "all", "none"])
@pytest.mark.parametrize("mode", ["none", "cheap", "block", "stage"])
def test_each_mode_of_recomputing_gives_the_gradients_of_plain(
    make_model: Make, mode: str, norms_frozen: str
) -> None:
    def gradients(mode: str) -> dict[str, torch.Tensor | None]:
        model = make_model(10, width=4, recompute=mode).train()
        freeze(model, ["stem", "layer2"], norms_frozen)
        volumes, frames = clips()
        model(volumes, frames).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return grads | dict(model.named_buffers())

    plain = gradients("none")
    for name, value in gradients(mode).items():
        expected = plain[name]
        frozen = name.startswith(("stem.", "blocks.1.")) and name.endswith(("weight", "bias"))
        assert (value is None) == (expected is None) == frozen
        if value is not None and expected is not None:
            assert torch.equal(value, expected), name


def test_frozen_statistics_stay_and_are_those_of_eval_mode(make_model: Make) -> None:
    model = make_model(10, width=4)
    freeze(model, [], "all")
    volumes, frames = clips()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = model.eval()(volumes, frames)
    model.train()
    # Kernels of the two modes may round in other ways.
    torch.testing.assert_close(model(volumes, frames), expected, rtol=1e-5, atol=1e-6)
    with precise_statistics(model):
        model(volumes, frames)
    running, own = by_running_and_own_statistics(model, volumes, frames)
    assert torch.equal(running, own), "there is no gap"
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_precise_statistics_are_of_the_layers_that_are_trained(make_model: Make) -> None:
    model = make_model(10, width=4).train()
    freeze(model, ["stem"])
    kept, taken = (model.stem.norm.running_mean.clone(), model.blocks[0].conv1.norm)
    before = taken.running_mean.clone()
    with precise_statistics(model):
        model(*clips())
    assert torch.equal(model.stem.norm.running_mean, kept)
    assert not torch.equal(taken.running_mean, before)
    assert sum(norm.frozen for norm in norms(model)) == 1
