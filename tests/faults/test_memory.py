"""Memory runs out on one of several ranks: all start again, with smaller micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import ShortMemory
from helpers import InterruptedSessionError, interrupt_at, losses_of, overrides, tiny_config
from launcher import Launcher

from dist_train.training.train import train

# 4 groups of 1:3 a step, and a checkpoint after each 4th.
SETTINGS = ("plan.batch=16", "optim.lr=3e-4", "snapshots.at=[3]")


def test_where_one_of_two_processes_has_no_memory_both_start_again_with_less(
    launcher: Launcher, store: Path, tmp_path: Path
) -> None:
    """Process 1 fails in its 6th step or a later one, in which process 0 waits for it. The launcher
    starts both again, from the checkpoint after step 4, with micro-batches of half the size."""
    two, alone = tmp_path / "two", tmp_path / "one"
    settings = overrides(store, two, *SETTINGS)
    launcher.elastic(settings, faults=[ShortMemory(1, 5, "memory")], restarts=1).well()
    first, second = json.loads((two / "run.json").read_text())["sessions"]
    assert (first["micro_batch"]["accumulate"], first["resumed_from_step"]) == (1, None)
    assert (second["micro_batch"]["accumulate"], second["resumed_from_step"]) == (2, 4)

    # All ranks together see in each micro-batch the clips that one process would.
    with pytest.raises(InterruptedSessionError):
        train(tiny_config(store, alone, *SETTINGS), progress=interrupt_at(4))
    train(tiny_config(store, alone, *SETTINGS, "train.accumulate=2"), resume="auto")
    assert losses_of(two) == pytest.approx(losses_of(alone), rel=1e-4)
