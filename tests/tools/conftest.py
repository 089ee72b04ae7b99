"""One run of tools/gpu.py, for the tests of all that reads what it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment


@pytest.fixture(scope="session")
def gpu_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder that it wrote to, and how it ended: every stage, on the CPU, at a tiny size."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    # Limits that a busy machine meets too: what they do is tested with steps that hang.
    command = ["--device", "cpu", "--tiny", "--seconds", "240", "--total", "600"]
    done = subprocess.run(
        [sys.executable, "tools/gpu.py", *command, "--out", str(out)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    return out, done
