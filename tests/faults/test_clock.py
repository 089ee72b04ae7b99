"""The wall clock jumps: only displayed times depend on it."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

from faults import ClockJump, NotANumber, Signal
from helpers import ROOT, overrides
from launcher import Launcher
from run_files import DROPOUT, assert_same

#: Modules that show the wall clock to users, or compare the clocks of machines.
DISPLAYS = {
    "doctor/links.py",
    "objects.py",
    "run/record.py",
    "training/reporting.py",
}


def test_hours_forth_and_back(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    """TensorBoard's files are begun after a jump ahead (the run goes back to a checkpoint), then by
    a session whose clock is right again, and by one whose clock is behind."""
    faults = [
        ClockJump(None, 3, "forth", hours=5),
        NotANumber(0, 5, "nan"),
        Signal(1, 9, "kill"),
        ClockJump(None, 10, "back", hours=-9),
        NotANumber(0, 13, "nan again"),
    ]
    group = launcher.elastic(overrides(store, tmp_path, DROPOUT), faults=faults)
    group.well()
    assert_same(tmp_path, straight)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [after["time"] - before["time"] for before, after in pairwise(lines)]
    assert max(steps) > 3600
    assert min(steps) < -3600


def test_who_reads_the_wall_clock() -> None:
    reads = re.compile(r"time\.time\(|\btime_ns\(|datetime\.(now|utcnow)\(|from time import")
    package = ROOT / "dist_train"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if reads.search(path.read_text())
    }
    assert found == DISPLAYS
