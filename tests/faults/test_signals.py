"""Told to stop: a checkpoint and a code that says why, or an end at once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults import Hang, Signal
from helpers import metrics_of, overrides
from launcher import Launcher
from run_files import DROPOUT, assert_same, checkpoints_of, sessions_of


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_the_step_it_is_at(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path, number: int, code: int
) -> None:
    """One rank alone is told; all save and leave together."""
    settings = overrides(store, tmp_path, DROPOUT)
    group = launcher.run(2, settings, faults=[Signal(1, 5, number=number)])
    assert group.codes() == [code, code], group.said()
    assert f"stopped by {signal.Signals(number).name} after step 6, which is saved" in group.said(0)
    assert checkpoints_of(tmp_path) == [4, 6]
    launcher.run(2, settings, resume=True).well()
    assert_same(tmp_path, straight)
    assert sessions_of(tmp_path)[1] == (2, 6)


def test_a_launcher_that_is_told_to_stop_ends_with_what_a_scheduler_requeues(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    settings = overrides(store, tmp_path, DROPOUT)
    told = Signal(0, 5, number=signal.SIGTERM, to_launcher=True)
    group = launcher.elastic(settings, faults=[told])
    assert group.codes() == [75], group.said()
    saved = checkpoints_of(tmp_path)[-1]
    assert len(metrics_of(tmp_path)) == saved, "nothing that was done is lost"
    launcher.elastic(settings).well()
    assert_same(tmp_path, straight)
    assert sessions_of(tmp_path)[1] == (2, saved)


def test_a_second_interrupt_ends_at_once_also_a_rank_that_waits_for_another(
    launcher: Launcher, store: Path, tmp_path: Path
) -> None:
    group = launcher.run(2, overrides(store, tmp_path), faults=[Hang(1, 6)])
    group.wait_for(lambda: (tmp_path / "checkpoints" / "step-4").exists())
    group.wait_for(lambda: len(metrics_of(tmp_path)) == 6)
    for rank in (0, 1):
        group.signal(signal.SIGINT, rank)
    for rank in (0, 1):
        group.signal(signal.SIGINT, rank)
    assert group.codes(10) == [130, 130], group.said()
    assert "interrupted twice" in group.said(0)
    assert checkpoints_of(tmp_path) == [4]
