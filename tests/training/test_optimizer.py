"""AdamW's groups, and one step against the update rule written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config import OptimSettings
from dist_train.distributed.backends.base import updates_done
from dist_train.training.optimizer import make_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(2, 1))


def test_only_weights_with_two_or_more_axes_decay() -> None:
    model = network()
    settings = OptimSettings(weight_decay=0.3)
    decayed, plain = make_optimizer(model, settings).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(plain["params"]) == 4
    groups = make_optimizer(model, settings.model_copy(update={"decay": "all"})).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    groups = make_optimizer(model, OptimSettings()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 3]


def test_the_first_step_is_that_of_the_paper() -> None:
    """Algorithm 2 of Loshchilov & Hutter 2019 at t = 1, where m = g and v = g² once corrected."""
    model = network()
    settings = OptimSettings(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    optimizer = make_optimizer(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(4.0).reshape(4, 1, 1, 1, 1)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        decay = 0.5 if parameter.ndim > 1 else 0.0
        stepped = gradient / (gradient.square().sqrt() + 1e-8) + decay * before[name]
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * stepped)


def test_the_fused_update_is_the_plain_one_but_for_rounding() -> None:
    """Gradients are random: AdamW would scale the rounding noise of zero gradients up."""
    runs = []
    for fused in (False, True):
        model = network()
        optimizer = make_optimizer(model, OptimSettings(lr=0.01, fused=fused))
        assert all(group["fused"] is (fused or None) for group in optimizer.param_groups)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        runs.append([*model.parameters(), *moments])
    for ours, theirs in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("fused", "where"), [(True, "meta"), (False, "cpu")])
def test_the_number_of_updates_lies_where_the_kernel_reads_it(fused: bool, where: str) -> None:
    optimizer = make_optimizer(network(), OptimSettings(fused=fused))
    done = updates_done(optimizer, 3, torch.empty(2, device="meta"))
    assert (done.device.type, done.dtype, done.shape) == (where, torch.float32, ())
