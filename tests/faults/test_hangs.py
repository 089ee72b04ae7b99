"""A rank hangs: every rank says where it is, and ends."""

from __future__ import annotations

from pathlib import Path

from faults import Hang
from helpers import overrides
from launcher import Launcher
from run_files import DROPOUT, assert_same


def test_a_rank_that_hangs_and_those_that_wait_for_it_tell_where(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    settings = overrides(store, tmp_path, DROPOUT)
    group = launcher.run(2, [*settings, "train.hang_timeout=3"], faults=[Hang(1, 6)])
    assert group.codes() == [75, 75], group.said()
    for rank in (0, 1):
        assert f"error (process {rank}): no step was finished in 3 s" in group.said(rank)
    assert "in strike" in group.said(1)
    assert "in strike" not in group.said(0)
    assert "in take" in group.said(0)
    assert "in take" not in group.said(1)
    launcher.run(2, settings, resume=True).well()
    assert_same(tmp_path, straight)


def test_a_rank_that_hangs_with_pythons_lock_tells_where_too(
    launcher: Launcher, store: Path, tmp_path: Path
) -> None:
    """It can neither run its own watchdog nor hear SIGTERM. That nobody waits longer for another
    than ``train.timeout`` does not come before."""
    settings = overrides(store, tmp_path, "train.timeout=4", "train.hang_timeout=1000")
    group = launcher.run(2, settings, faults=[Hang(1, 2, lock=True)])
    assert group.codes() == [75, 1], group.said()
    assert "error (process 0): no step was finished in 3 s" in group.said(0)
    assert "Timeout (0:00:06)!" in group.said(1)
    assert "in strike" in group.said(1)
