"""What a run's folder shows of what it went through."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import board_of, metrics_of

STEPS = 18


def assert_same(run: Path, straight: Path, steps: int = STEPS, *, tensorboard: bool = True) -> None:
    """All metrics of all steps, each once, also in TensorBoard; and the weights."""
    assert [line["step"] for line in metrics_of(run)] == list(range(1, steps + 1))
    assert metrics_of(run) == metrics_of(straight)
    for name in ("train/loss", "val/loss") if tensorboard else ():
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


def checkpoints_of(run: Path) -> list[int]:
    """Steps of those that are there, ascending."""
    found = (run / "checkpoints").glob("step-*[0-9]")
    return sorted(int(path.name.removeprefix("step-")) for path in found)
