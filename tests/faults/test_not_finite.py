"""A loss that is not finite: back to the last checkpoint, on without the step, or an end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import InfiniteGradient, NotANumber
from helpers import losses_of, metrics_of, overrides
from launcher import Launcher
from run_files import DROPOUT, STEPS, assert_same


def test_a_fault_that_does_not_come_again_leaves_no_trace(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, and after one; in the loss, and in the gradient alone."""
    faults = [
        NotANumber(0, 1, "early"),
        NotANumber(1, 9, "late", value=float("inf")),
        InfiniteGradient(1, 14, "last"),
    ]
    group = launcher.run(2, overrides(store, tmp_path, DROPOUT), faults=faults)
    group.well()
    assert_same(tmp_path, straight)
    assert "at step 2 the loss is nan, by process 0" in group.said(0)
    assert "back to step 0, and it is tried again" in group.said(0)
    assert "by process 1" in group.said(0)
    assert re.search(r"at step 15 the loss is 0\.\d+ and the gradient norm inf", group.said(0))
    assert "back to step 8, and it is tried again" in group.said(0)


def test_a_step_that_is_bad_again_is_left_out(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    group = launcher.run(2, overrides(store, tmp_path, DROPOUT), faults=[NotANumber(1, 9)])
    group.well()
    assert "back to step 8, and the step is left out" in group.said(0)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, STEPS + 1))
    losses = losses_of(tmp_path)
    assert losses[:9] == losses_of(straight)[:9]
    assert losses[9] is None
    assert None not in losses[10:]


def test_after_too_many_the_run_ends(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    faults = [NotANumber(0, step) for step in range(5, 9)]
    settings = overrides(store, tmp_path, "train.max_skips=2")
    group = launcher.run(2, settings, faults=faults)
    assert group.codes() == [1, 1], group.said()
    assert "training diverged: at step 8 the loss is nan" in group.said(0)
    assert "2 steps were left out already" in group.said(0)


@pytest.mark.parametrize(
    "backend", [pytest.param("zero2", marks=pytest.mark.soak), "zero3", "fsdp2"]
)
def test_no_backend_keeps_what_a_bad_step_did(
    launcher: Launcher, store: Path, tmp_path: Path, backend: str
) -> None:
    """DeepSpeed steps before anyone can look at the norm, so that its weights are NaN too."""
    steady, disturbed = tmp_path / "steady", tmp_path / "disturbed"
    settings = (f"train.backend={backend}", "train.epochs=2", "snapshots.at=[2]")
    launcher.run(2, overrides(store, steady, *settings)).well()
    faults = [NotANumber(0, 1, "early"), NotANumber(1, 9, "late")]
    launcher.run(2, overrides(store, disturbed, *settings), faults=faults).well()
    assert_same(disturbed, steady, steps=12)
