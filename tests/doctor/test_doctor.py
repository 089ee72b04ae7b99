"""``dist-train doctor``, alone and under a launcher."""

from __future__ import annotations

import re
import resource
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, dist_train, environment, launched, run

WIDE = {"COLUMNS": "250"}


def rows(said: str) -> dict[str, tuple[str, str]]:
    """State and finding by what was checked."""
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


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    done = run(launched("cpu_2proc.yaml", "doctor", "--folder", tmp_path), **WIDE)
    found = rows(done.stdout)
    assert done.returncode == int("bad" in [state for state, _ in found.values()]), done.stderr
    assert found["CPUs"][1].endswith("for 2 processes x 1 threads")
    assert {"all-reduce", "slowest pair", "clocks"} <= found.keys()
    assert re.fullmatch(r"at most 0\.\d+ s apart \(rank \d from rank 0\)", found["clocks"][1])
    # Of one machine the findings are told once.
    assert done.stdout.count(" numpy ") == 1
    rates = [re.split(r" *│ *", line)[1:-1] for line in done.stdout.splitlines() if "iB │" in line]
    assert [(name, size) for name, size, *_ in rates] == [
        (name, size)
        for name in ("all-gather", "all-reduce")
        for size in ("1 KiB", "1 MiB", "25 MiB", "100 MiB")
    ]
    assert all(float(bus) > 0 for *_, bus in rates[1:4])
