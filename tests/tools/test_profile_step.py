"""The trace holds the parts of a step, and the table its kernels."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment


@pytest.mark.slow
def test_one_command_leaves_a_trace_and_prints_the_top_kernels(tmp_path: Path) -> None:
    settings = ["model.name=resnet3d-10", "model.width=4", "train.precision=fp32"]
    command = [sys.executable, "tools/profile_step.py", *settings, "--clips", "2"]
    done = subprocess.run(
        [*command, "--frames", "8", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "convolution_backward" in done.stdout
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    for part in ("forward", "backward", "optimizer"):
        assert names.count(part) == 2
