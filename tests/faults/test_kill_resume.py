"""SIGKILL in the middle of training, then --resume auto: as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import (
    board_of,
    dist_train,
    kill_when,
    launched,
    metrics_of,
    overrides,
    run_well,
    tiny_store,
)

EPOCHS = 10
STEPS = 6 * EPOCHS
LONGER = (f"train.epochs={EPOCHS}", "snapshots.at=[9, 10]", "model.dropout=0.3")
CASES = {
    "one process": (dist_train("train"), "fp32"),
    "one process, bf16": (dist_train("train"), "bf16"),
    "two processes": (launched("cpu_2proc.yaml", "train"), "fp32"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "precision"), CASES.values(), ids=CASES)
def test_a_killed_and_resumed_run_equals_the_straight_one(
    command: list[str], precision: str, tmp_path: Path
) -> None:
    """Checkpoints come every 4 steps, epochs are of 6: the kill falls inside an epoch."""
    store = tiny_store(tmp_path / "store")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    longer = (*LONGER, f"train.precision={precision}")
    run_well([*command, *overrides(store, straight, *longer)])

    settings = overrides(store, killed, *longer)
    kill_when([*command, *settings], (killed / "checkpoints" / "step-8").exists)
    left = max(int(p.name[5:]) for p in (killed / "checkpoints").glob("step-*[0-9]"))
    assert 8 <= left < STEPS, "the kill came too late to show anything"
    run_well([*command, "--resume", "auto", *settings])

    sessions = json.loads((killed / "run.json").read_text())["sessions"]
    assert [session["resumed_from_step"] for session in sessions] == [None, left]
    for path in ("snapshots/step-54", "snapshots/step-60"):
        name = f"{path}.safetensors"
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert [line["step"] for line in metrics_of(killed)] == list(range(1, STEPS + 1))
    assert metrics_of(killed) == metrics_of(straight)
    for name in ("train/loss", "train/lr", "val/loss"):
        assert board_of(killed, name) == board_of(straight, name)
    assert [step for step, _ in board_of(killed, "train/loss")] == list(range(1, STEPS + 1))
    assert not list((killed / "checkpoints").glob("*.partial"))
