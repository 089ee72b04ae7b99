"""Learning rates by part of the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config import FinetuneSettings, OptimSettings, TrainSettings
from dist_train.distributed.backends import make_backend
from dist_train.errors import ModelError
from dist_train.models.parts import parts_of
from dist_train.models.resnet3d import ResNet3D
from dist_train.training.optimizer import make_optimizer
from dist_train.training.parameter_groups import parameter_groups

PLAIN = OptimSettings(lr=0.1, weight_decay=0.3)


def rates(model: nn.Module, **finetune: object) -> dict[str, float]:
    """The factor of the rate of each parameter by name."""
    groups = parameter_groups(model, PLAIN, FinetuneSettings.model_validate(finetune))
    assert all(group["params"] for group in groups)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def test_the_rate_falls_from_the_head_to_the_stem() -> None:
    model = ResNet3D(10, width=4)
    found = rates(model, layer_decay=0.5, head_lr=0.3)
    expected = dict(zip(parts_of(model), [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3.0], strict=True))
    for part, names in parts_of(model).items():
        assert [found[name] for name in names] == pytest.approx([expected[part]] * len(names))
    assert set(rates(model, layer_decay=0.5).values()) == {1 / 2**k for k in range(6)}
    assert {r for n, r in rates(model, head_lr=0.3).items() if n[:4] != "head"} == {1.0}


def test_weight_decay_is_that_of_one_rate() -> None:
    model = ResNet3D(10, width=4)
    groups = parameter_groups(model, PLAIN, FinetuneSettings(layer_decay=0.9))
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}
    assert len(groups) == 2 * 6
    assert len(parameter_groups(model, PLAIN, FinetuneSettings())) == 2


def test_a_model_without_a_head_has_one_rate() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Conv3d(1, 1, 1))
    assert set(rates(net).values()) == {1.0}
    with pytest.raises(ModelError, match="no part called head"):
        rates(net, layer_decay=0.5)


def test_the_schedule_keeps_the_ratios() -> None:
    backend = make_backend(TrainSettings(precision="fp32"), clip_norm=None)
    finetune = FinetuneSettings(layer_decay=0.5)
    backend.wrap(ResNet3D(10, width=4), lambda net: make_optimizer(net, PLAIN, finetune))
    try:
        for lr in (0.1, 1e-6):
            backend.set_lr(lr)
            found = sorted({group["lr"] / lr for group in backend.optimizer.param_groups})
            assert found == pytest.approx([1 / 2**k for k in reversed(range(6))])
        # A step of AdamW is as long as the rate, at first.
        before = {n: p.detach().clone() for n, p in backend.module.named_parameters()}
        backend.set_lr(1e-3)
        with backend.accumulating(last=True):
            backend.backward(backend.model(torch.rand(4, 1, 8, 16, 16)).square().sum())
        backend.update()
        moved = {
            name: float((p.detach() - before[name]).abs().max())
            for name, p in backend.module.named_parameters()
        }
        assert moved["head.bias"] == pytest.approx(1e-3, rel=0.01)
        assert moved["stem.norm.bias"] == pytest.approx(1e-3 / 32, rel=0.01)
    finally:
        backend.close()
