"""The learning rate: values computed by hand, and where the minima are."""

from __future__ import annotations

import math

import pytest

from dist_train.config import ScheduleSettings
from dist_train.training.schedule import Schedule


def schedule(steps: int, epochs: int, peak: float = 1.0, **settings: object) -> Schedule:
    return Schedule(ScheduleSettings.model_validate(settings), peak, steps, epochs)


def test_warm_up_rises_linearly_and_reaches_the_peak_right_after() -> None:
    made = schedule(50, 10, peak=0.6, warmup_epochs=1)
    assert [made.lr(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_cosine_by_hand() -> None:
    made = schedule(5, 1, warmup_epochs=0, min_lr=0.2)
    quarter = math.sqrt(0.5)
    expected = [1.0, 0.6 + 0.4 * quarter, 0.6, 0.6 - 0.4 * quarter, 0.2]
    assert [made.lr(step) for step in range(5)] == pytest.approx(expected)


def test_cosine_falls_to_min_lr_at_the_very_last_step() -> None:
    made = schedule(100, 10, min_lr=1e-6)
    rates = [made.lr(step) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1.0, pytest.approx(1e-6))
    assert made.minima() == [99]


def test_oscillation_swings_in_whole_waves_between_the_two_rates() -> None:
    # 10 steps an epoch: warm-up 0-9, peaks at 10, 30, 50, minima at 20, 40.
    made = schedule(60, 6, name="oscillating", warmup_epochs=1, period=2, min_lr=0.1)
    rates = [made.lr(step) for step in (10, 15, 20, 30, 40, 50)]
    assert rates == pytest.approx([1.0, 0.55, 0.1, 1.0, 0.1, 1.0])
    assert made.minima() == [20, 40, 59]


@pytest.mark.parametrize(("epochs", "warmup", "period"), [(20, 1, 2), (11, 2.5, 3)])
def test_the_named_minima_are_the_lowest_of_their_neighbours(
    epochs: int, warmup: float, period: float
) -> None:
    steps = 40 * epochs
    made = schedule(
        steps, epochs, name="oscillating", warmup_epochs=warmup, period=period, min_lr=0.0
    )
    rates = [made.lr(step) for step in range(steps)]
    lowest = [
        step
        for step in range(round(warmup * 40) + 1, steps - 1)
        if rates[step] <= min(rates[step - 1], rates[step + 1])
    ]
    *inner, last = made.minima()
    assert last == steps - 1
    # Two neighbours can tie where a minimum falls between them.
    assert all(any(abs(step - other) <= 1 for other in lowest) for step in inner)
    assert all(any(abs(step - other) <= 1 for other in [*inner, last]) for step in lowest)


def test_a_minimum_at_the_last_step_is_named_once() -> None:
    made = schedule(21, 2, name="oscillating", warmup_epochs=0, period=4 / 2.1, min_lr=0.0)
    assert made.minima() == sorted(set(made.minima()))
    assert made.minima()[-1] == 20


@pytest.mark.parametrize("name", ["cosine", "oscillating"])
def test_odd_settings(name: str) -> None:
    """A peak below the minimum, a warm-up longer than the run, and a run of one step."""
    low_peak = schedule(10, 1, name=name, peak=1e-3, warmup_epochs=0, min_lr=0.1)
    assert {low_peak.lr(step) for step in range(10)} == {1e-3}
    warming = schedule(4, 1, name=name, warmup_epochs=9)
    assert [warming.lr(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    single = schedule(1, 1, name=name)
    assert (single.lr(0), single.minima()) == (1.0, [0])
