"""AdamW's groups, and one step against the update rule written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_train.config import OptimSettings, ScheduleSettings
from dist_train.distributed.backends.base import updates_done
from dist_train.training.optimizer import Schedule, make_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(2, 1))


def test_only_weights_with_two_or_more_axes_decay() -> None:
    model = network()
    decayed, plain = make_optimizer(model, OptimSettings(weight_decay=0.3)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 4
    every = {id(p) for p in model.parameters()}
    assert {id(p) for p in decayed["params"] + plain["params"]} == every


def test_all_parameters_are_decayed_where_that_is_asked_for() -> None:
    groups = make_optimizer(network(), OptimSettings(weight_decay=0.3, decay="all")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    groups = make_optimizer(model, OptimSettings()).param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert not held & {id(p) for p in model[0].parameters()}


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
    """Gradients are given: computed ones of 0 would be noise, which AdamW makes as large as any."""
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


# The learning rate: values computed by hand, and where the minima are.


def schedule(steps: int, epochs: int, peak: float = 1.0, **settings: object) -> Schedule:
    return Schedule(ScheduleSettings.model_validate(settings), peak, steps, epochs)


def test_warm_up_rises_linearly_and_reaches_the_peak_right_after() -> None:
    made = schedule(50, 10, peak=0.6, warmup_epochs=1)
    assert [made.lr(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_cosine_without_warm_up_by_hand() -> None:
    made = schedule(5, 1, warmup_epochs=0, min_lr=0.2)
    quarter = math.sqrt(0.5)
    expected = [1.0, 0.6 + 0.4 * quarter, 0.6, 0.6 - 0.4 * quarter, 0.2]
    assert [made.lr(step) for step in range(5)] == pytest.approx(expected)


def test_cosine_falls_to_min_lr_at_the_very_last_step() -> None:
    made = schedule(100, 10, min_lr=1e-6)
    rates = [made.lr(step) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(1e-6)
    assert made.minima() == [99]


def test_oscillation_swings_in_whole_waves_between_the_two_rates() -> None:
    # 10 steps an epoch: warm-up 0-9, peaks at 10, 30, 50, minima at 20, 40.
    made = schedule(60, 6, name="oscillating", warmup_epochs=1, period=2, min_lr=0.1)
    for step in (10, 30, 50):
        assert made.lr(step) == pytest.approx(1.0)
    for step in (20, 40):
        assert made.lr(step) == pytest.approx(0.1)
    assert made.lr(15) == pytest.approx(0.55)
    assert made.minima() == [20, 40, 59]


@pytest.mark.parametrize(("epochs", "warmup", "period"), [(20, 1, 2), (7, 0, 1.5), (11, 2.5, 3)])
def test_the_named_minima_are_the_lowest_of_their_neighbours(
    epochs: int, warmup: float, period: float
) -> None:
    steps = 40 * epochs
    made = schedule(
        steps, epochs, name="oscillating", warmup_epochs=warmup, period=period, min_lr=0.0
    )
    first = round(warmup * 40)
    rates = [made.lr(step) for step in range(steps)]
    found = [
        step
        for step in range(first + 1, steps - 1)
        if rates[step] <= rates[step - 1] and rates[step] <= rates[step + 1]
    ]
    # Two neighbours can tie where a minimum falls between them.
    inner = made.minima()[:-1]
    assert made.minima()[-1] == steps - 1
    assert len(inner) == math.floor((steps - 1 - first) / (period * 40) + 0.5)
    assert all(any(abs(step - other) <= 1 for other in found) for step in inner)
    assert all(any(abs(step - other) <= 1 for other in [*inner, steps - 1]) for step in found)


def test_a_minimum_at_the_last_step_is_named_once() -> None:
    made = schedule(21, 2, name="oscillating", warmup_epochs=0, period=4 / 2.1, min_lr=0.0)
    assert made.minima() == sorted(set(made.minima()))
    assert made.minima()[-1] == 20


def test_a_peak_below_min_lr_stays_the_peak() -> None:
    made = schedule(10, 1, peak=1e-3, warmup_epochs=0, min_lr=0.1)
    assert {made.lr(step) for step in range(10)} == {1e-3}


def test_a_warm_up_longer_than_the_run_never_passes_the_peak() -> None:
    made = schedule(4, 1, warmup_epochs=9)
    assert [made.lr(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_run_of_one_step_has_a_rate_and_a_minimum() -> None:
    for name in ("cosine", "oscillating"):
        made = schedule(1, 1, name=name)
        assert made.lr(0) == 1.0
        assert made.minima() == [0]
