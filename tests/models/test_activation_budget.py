"""Measured costs of the network's parts, and the recompute modes chosen for a budget."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from live_bytes import peak_of_step
from torch import nn

from dist_train.errors import ModelError
from dist_train.models.activation_budget import (
    MODES,
    Cost,
    Costs,
    choose_plan,
    measure_parts,
    weigh,
)
from dist_train.models.norm import share_statistics
from dist_train.models.recompute import Recompute
from dist_train.models.registry import build_model
from dist_train.models.resnet3d import ResNet3D
from dist_train.models.trunk import RecomputePlan

SHAPE = (2, 1, 16, 64, 64)
PLANS: list[RecomputePlan] = [
    ("none",) * 5,
    ("cheap",) * 5,
    ("stage", "cheap", "none", "block", "stage"),
]
make_model = partial(build_model, "resnet3d-50", width=8)


@pytest.fixture(scope="module")
def costs() -> Costs:
    return measure_parts(make_model, SHAPE)


def whole_step(plan: RecomputePlan, frames: torch.Tensor | None = None) -> int:
    """Peak bytes of a real step of the real network, without its weights."""
    model = make_model()
    assert isinstance(model, ResNet3D)
    model.recompute = plan
    return peak_of_step(model, torch.randn(SHAPE), frames)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_parts_add_up_to_what_a_real_step_takes(costs: Costs, plan: RecomputePlan) -> None:
    """Or to a little more: tensors that two parts share count for both."""
    assert 0.98 < weigh(plan, costs).bytes / whole_step(plan) < 1.12


def test_a_padded_batch_takes_little_more() -> None:
    full, padded = whole_step(PLANS[0]), whole_step(PLANS[0], torch.tensor([16, 15]))
    assert padded < 1.25 * full


def test_each_mode_does_more_work_than_the_one_before(costs: Costs) -> None:
    for of_part in costs:
        none, cheap, block, stage = (of_part[mode].work for mode in MODES)
        assert none < cheap < block <= stage < 1.6 * none


def test_half_precision_takes_half() -> None:
    small = partial(build_model, "resnet3d-10", width=8)
    whole, halves = (
        weigh(PLANS[0], measure_parts(small, SHAPE, dtype)) for dtype in (None, torch.bfloat16)
    )
    ratio = halves.bytes / whole.bytes
    assert 0.45 < ratio < 0.75


def test_shared_statistics_are_counted_without_other_processes() -> None:
    small = partial(build_model, "resnet3d-10", width=2)

    def shared() -> nn.Module:
        model = small()
        share_statistics(model, lambda sums: None)
        return model

    shape = (2, 1, 16, 32, 32)
    taken = [weigh(PLANS[0], measure_parts(model, shape)).bytes for model in (small, shared)]
    assert taken[0] <= taken[1] < 2 * taken[0]


def test_measuring_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure_parts(partial(build_model, "resnet3d-10", width=2), (1, 1, 16, 64, 64))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_networks_are_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no parts that can be recomputed"):
        measure_parts(lambda: nn.Linear(1, 1), (1, 1))


def costs_of(**by_mode: tuple[int, int, float]) -> dict[Recompute, Cost]:
    return {mode: Cost(*by_mode[mode]) for mode in MODES}


#: Kept, peak, work, by hand: a first part that is large and cheap to run again, and a second one.
BY_HAND: Costs = [
    costs_of(none=(60, 70, 10), cheap=(30, 70, 11), block=(20, 70, 14), stage=(10, 70, 14)),
    costs_of(none=(40, 50, 20), cheap=(20, 45, 22), block=(10, 30, 26), stage=(5, 50, 26)),
]


@pytest.mark.parametrize(
    ("budget", "plan", "taken", "work"),
    [
        (1000, ("none", "none"), 110, 30),
        (110, ("none", "none"), 110, 30),
        (109, ("cheap", "none"), 80, 31),
        (79, ("cheap", "cheap"), 75, 33),
        (74, ("block", "none"), 70, 34),
        (70, ("block", "none"), 70, 34),
        # Nothing fits: the first part alone takes 70.
        (69, ("block", "none"), 70, 34),
    ],
)
def test_the_cheapest_plan_that_fits(
    budget: int, plan: tuple[str, str], taken: int, work: float
) -> None:
    choice = choose_plan(BY_HAND, budget)
    assert (choice.plan, choice.bytes) == (plan, taken)
    assert choice.work == pytest.approx(work / 30)
