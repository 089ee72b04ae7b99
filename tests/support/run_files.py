"""What a run's folder shows: its metrics, snapshots, sessions and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import board_of, contents, metrics_of

#: Of the run that nobody disturbs (``straight`` of tests/faults).
DROPOUT, STEPS = "model.dropout=0.3", 18


def assert_same(run: Path, straight: Path, steps: int = STEPS, *, tensorboard: bool = True) -> None:
    """All metrics of all steps, each once, also in TensorBoard; and the weights."""
    assert [line["step"] for line in metrics_of(run)] == list(range(1, steps + 1))
    assert metrics_of(run) == metrics_of(straight)
    for name in ("train/loss", "val/loss") if tensorboard else ():
        assert board_of(run, name) == board_of(straight, name)
    assert contents(run / "snapshots") == contents(straight / "snapshots")


def sessions_of(run: Path) -> list[tuple[int, int | None]]:
    """World size, and the step that was resumed, of each session."""
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    return [(s["world_size"], s["resumed_from_step"]) for s in sessions]


def checkpoints_of(run: Path) -> list[int]:
    """Steps of the checkpoints, ascending."""
    found = (run / "checkpoints").glob("step-*[0-9]")
    return sorted(int(path.name.removeprefix("step-")) for path in found)
