"""Ranks in different states: found in a session's first steps, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from faults import Fault, OtherStep, OtherWeights
from helpers import overrides, tiny_store
from launcher import Launcher
from run_files import DROPOUT

WEIGHT = "head.weight"


def said(launcher: Launcher, settings: Sequence[str] | Callable[[int], Sequence[str]],
         *faults: Fault, resume: bool = False) -> str:  # fmt: skip
    """The message that both of two ranks end with."""
    group = launcher.run(2, settings, faults=faults, resume=resume)
    assert group.codes() == [1, 1], group.said()
    first, second = (
        next(line for line in group.said(rank).splitlines() if line.startswith("error"))
        for rank in (0, 1)
    )
    assert first.removeprefix("error: ") == second.removeprefix("error (process 1): ")
    return first


def test_a_weight_that_differs_by_a_bit(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    message = said(launcher, overrides(store, tmp_path), OtherWeights(1, 1, weight=WEIGHT))
    assert f"the weight {WEIGHT} differs between processes" in message
    assert "on process 1," in message


def test_also_in_the_first_steps_after_a_resumption(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step-18")
    settings = overrides(store, out, DROPOUT)
    fault = OtherWeights(0, 16, weight=WEIGHT)
    assert f"the weight {WEIGHT} differs" in said(launcher, settings, fault, resume=True)
    # As a setting says.
    unseen = launcher.run(2, [*settings, "train.check_steps=0"], resume=True, faults=[fault])
    unseen.well()


def test_another_step(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    message = said(launcher, overrides(store, tmp_path), OtherStep(1, 0))
    assert "the step differs between processes: 1 on process 1, 0 on the others" in message


@pytest.mark.parametrize(("other", "what"), [("seed=1", "the plan"), ("store", "the store")])
def test_another_plan_or_store(
    launcher: Launcher, store: Path, tmp_path: Path, other: str, what: str
) -> None:
    if other == "store":
        other = f"store={tiny_store(tmp_path / 'other', seed=1)}"
    out = tmp_path / "run"
    message = said(launcher, lambda rank: overrides(store, out, *([other] if rank else ())))
    assert f"{what} differs between processes" in message
    assert "on process 1," in message
