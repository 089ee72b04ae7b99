"""SIGKILL of any rank: the launcher starts the run again, and it ends as if nothing happened."""

from __future__ import annotations

import json
from pathlib import Path

from faults import Signal
from helpers import board_of, losses_of, metrics_of, overrides
from launcher import Launcher

STEPS = 18
DROPOUT = "model.dropout=0.3"


def assert_same(run: Path, straight: Path, steps: int = STEPS) -> None:
    """All figures of all steps, each once, in both places; and the weights."""
    assert [line["step"] for line in metrics_of(run)] == list(range(1, steps + 1))
    assert metrics_of(run) == metrics_of(straight)
    for name in ("train/loss", "val/loss"):
        assert board_of(run, name) == board_of(straight, name)
    names = sorted(path.name for path in (straight / "snapshots").iterdir())
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == names
    for name in names:
        assert (run / "snapshots" / name).read_bytes() == (
            straight / "snapshots" / name
        ).read_bytes()


def sessions_of(run: Path) -> list[tuple[int, int | None]]:
    """World size, and step it went on from, of each."""
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    return [(s["world_size"], s["resumed_from_step"]) for s in sessions]


def test_each_rank_is_killed_and_the_launcher_goes_on(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, after one, and in the last epoch."""
    faults = [Signal(0, 2, "a"), Signal(1, 6, "b"), Signal(0, 14, "c")]
    group = launcher.elastic(overrides(store, tmp_path / "run", DROPOUT), faults=faults)
    group.well()
    assert_same(tmp_path / "run", straight)
    begun = [step for _, step in sessions_of(tmp_path / "run")]
    assert begun[:2] == [None, None]
    assert begun[2] in (None, 4), begun
    assert begun[3] in (8, 12), begun
    assert len(begun) == 4
