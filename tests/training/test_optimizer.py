"""Groups of parameters, and steps of each optimizer against its rule written out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers import cut, tiny_config
from short_runs import assert_same_run
from torch import nn

from dist_train.config import OptimSettings, load_config
from dist_train.distributed.backends.base import updates_done
from dist_train.errors import CheckpointError, ConfigError
from dist_train.training.optimizer import make_optimizer
from dist_train.training.train import train


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


def stepped(model: nn.Module, settings: OptimSettings, steps: int) -> list[list[torch.Tensor]]:
    """Set random gradients and update, and return the gradients of each step."""
    optimizer = make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(1)
    all_gradients = []
    for _ in range(steps):
        gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        all_gradients.append(gradients)
    return all_gradients


@pytest.mark.parametrize("fused", [False, True])
def test_sgd_takes_nesterovs_steps(fused: bool) -> None:
    """v = m v + g and x = x - lr (g + m v), where g has the decay: Sutskever et al. 2013, with the
    look-ahead point for x, as in torch."""
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    settings = OptimSettings(name="sgd", lr=0.1, momentum=0.7, weight_decay=0.5, fused=fused)
    all_gradients = stepped(model, settings, 3)
    for place, x in enumerate(before):
        velocity = torch.zeros_like(x)
        for gradients in all_gradients:
            g = gradients[place] + (0.5 if x.ndim > 1 else 0.0) * x
            velocity = 0.7 * velocity + g
            x = x - 0.1 * (g + 0.7 * velocity)
        torch.testing.assert_close(list(model.parameters())[place].detach(), x)


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_lamb_takes_the_steps_of_the_paper(decay: Literal["weights", "all"]) -> None:
    """Algorithm 2 of You et al. 2020, in float64; vectors that do not decay are not scaled."""
    model = network()
    with torch.no_grad():
        # Of norm zero, so its update is not scaled.
        model[3].weight.zero_()
    before = [p.detach().clone() for p in model.parameters()]
    settings = OptimSettings(name="lamb", lr=0.1, betas=(0.8, 0.9), weight_decay=0.5, decay=decay)
    all_gradients = stepped(model, settings, 3)
    for place, start in enumerate(before):
        x, adapts = start.double(), start.ndim > 1 or decay == "all"
        m = v = torch.zeros_like(x)
        for t, gradients in enumerate(all_gradients, 1):
            g = gradients[place].double()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            u = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
            u = u + (0.5 if adapts else 0.0) * x
            ratio = x.norm() / u.norm() if adapts and x.norm() > 0 else 1.0
            x = x - 0.1 * ratio * u
        found = list(model.parameters())[place].detach()
        torch.testing.assert_close(found, x.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["optim.momentum=0.8"], "name: adamw has no momentum"),
        (["optim.name=sgd", "optim.betas=[0.8, 0.9]"], "name: sgd has no betas"),
        (["optim.name=lamb", "optim.momentum=0.8"], "name: lamb has no momentum"),
        (["optim.name=lamb", "optim.fused=true"], "name: lamb has no fused"),
        (["optim.name=lamb", "train.backend=zero2"], "needs the norms of whole tensors"),
        (["optim.name=adam"], "'adamw', 'sgd' or 'lamb'"),
    ],
)
def test_what_an_optimizer_has_not_is_refused(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(None, ["store=s", *settings])


def test_sgd_decays_less_unless_told() -> None:
    assert load_config(None, ["store=s", "optim.name=sgd"]).optim.weight_decay == 1e-4
    given = ["store=s", "optim.name=sgd", "optim.weight_decay=0.05"]
    assert load_config(None, given).optim.weight_decay == 0.05


def test_moments_of_another_optimizer_are_refused(trained: Path, tmp_path: Path) -> None:
    out = cut(trained, tmp_path / "run", after=10**9)
    other = [f"out={out}", "optim.name=lamb", "train.epochs=2"]
    with pytest.raises(CheckpointError, match=r"moments are of .* adamw, and the run has"):
        train(load_config(out / "config.yaml", other), resume="auto")


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_a_resumed_run_equals_the_straight_one(name: str, store: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    more = (f"optim.name={name}", "train.epochs=2", "snapshots.at=[2]", "checkpoint.keep_last=9")
    train(tiny_config(store, straight, *more))
    resumed = cut(straight, tmp_path / "resumed", after=4)
    train(tiny_config(store, resumed, *more), resume="auto")
    assert_same_run(resumed, straight)
