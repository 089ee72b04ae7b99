"""A rank that takes longer than the others is named."""

from __future__ import annotations

import json
import socket
import statistics
from pathlib import Path

from faults import Slow
from helpers import overrides
from launcher import Launcher


def test_a_slow_rank_is_named_once(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    """Though every rank's steps take as long as its own: the others wait for it, in the forward
    pass for shared statistics, and in the backward pass for gradients."""
    settings = overrides(store, tmp_path, "train.epochs=4")
    group = launcher.run(2, settings, faults=[Slow(1, 0, seconds=0.15)])
    group.well()
    said = [line for line in group.said().splitlines() if "is slow" in line]
    (line,) = said
    assert f"process 1 on {socket.gethostname()} is slow: over the last 20 steps" in line
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    ratios = [line["speed/slowest_rank_ratio"] for line in lines]
    assert statistics.median(ratios) > 1.5
