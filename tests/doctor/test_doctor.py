"""``dist-train doctor`` in one process and under a launcher."""

from __future__ import annotations

import re
import resource
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, dist_train, environment
from launcher import Launcher

WIDE = {"COLUMNS": "250"}


def rows(said: str) -> dict[str, tuple[str, str]]:
    """(state, finding) by subject of the check."""
    cells = [re.split(r" *│ *", line)[1:-1] for line in said.splitlines() if line.startswith("│")]
    return {what: (state, found) for state, what, found, _ in (c for c in cells if len(c) == 4)}


@pytest.mark.slow
def test_alone_on_a_machine_with_few_files(tmp_path: Path) -> None:
    done = subprocess.run(
        dist_train("doctor", "--folder", tmp_path),
        env=environment(**WIDE),
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)),
    )
    assert done.returncode == 1, done.stderr
    found = rows(done.stdout)
    assert {what for what, (state, _) in found.items() if state == "bad"} == {"open files"}
    assert found["open files"] == ("bad", "300")
    assert found["numpy"][0] == "ok"
    assert f"disk of {tmp_path}: random reads" in found


def test_two_processes(launcher: Launcher, tmp_path: Path) -> None:
    argv = ["-m", "dist_train", "doctor", "--folder", tmp_path]
    group = launcher.program(2, argv, OMP_NUM_THREADS="1", **WIDE)
    codes, told = group.codes(), group.said(0)
    found = rows(told)
    assert codes == [int("bad" in [state for state, _ in found.values()])] * 2, group.said()
    assert found["CPUs"][1].endswith("for 2 processes x 1 threads")
    assert {"all-reduce", "slowest pair", "clocks"} <= found.keys()
    assert re.fullmatch(r"at most 0\.\d+ s apart \(rank \d from rank 0\)", found["clocks"][1])
    # Of one machine the findings are told once.
    assert told.count(" numpy ") == 1
    rates = [re.split(r" *│ *", line)[1:-1] for line in told.splitlines() if "iB │" in line]
    assert [(name, size) for name, size, *_ in rates] == [
        (name, size)
        for name in ("all-gather", "all-reduce")
        for size in ("1 KiB", "1 MiB", "25 MiB", "100 MiB")
    ]
    assert all(float(bus) > 0 for *_, bus in rates[1:4])
