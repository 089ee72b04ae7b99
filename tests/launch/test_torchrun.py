"""launch/torchrun.sh and elastic.py: codes that say how training ended.

That they train on two processes, and start them anew, is in tests/faults/test_kills.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers import LAUNCH, overrides, run, run_well

# One interpreter for all cases, as torch takes seconds to load. It prints the code of each.
CODES = """
import sys
launch, worker, *cases = sys.argv[1:]
sys.path.insert(0, launch)
import elastic
for case in cases:
    sys.argv = ["elastic.py", "--standalone", "--nproc-per-node=1", worker, case]
    print("CODE", elastic.run(), flush=True)
"""
# A worker that ends as its argument says: by a signal to itself, to its launcher, or with a code.
WORKER = """
import os, signal, sys
kind, value = sys.argv[1].split(":")
if kind == "self":
    os.kill(os.getpid(), int(value))
if kind == "launcher":
    os.kill(os.getppid(), int(value))
    signal.pause()
sys.exit(int(value))
"""
CASES = {
    "exit:0": 0,
    "exit:75": 75,
    "exit:3": 3,
    "self:9": 128 + 9,
    "self:15": 128 + 15,
    "launcher:15": 75,
    "launcher:2": 128 + 2,
}


@pytest.mark.slow
def test_codes(tmp_path: Path) -> None:
    (tmp_path / "codes.py").write_text(CODES)
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, tmp_path / "codes.py", LAUNCH, tmp_path / "worker.py", *CASES]
    said = run_well([*map(str, command)], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    codes = [int(line.split()[1]) for line in said.splitlines() if line.startswith("CODE")]
    assert dict(zip(CASES, codes, strict=True)) == CASES


@pytest.mark.slow
def test_torchrun_ends_with_the_code_of_a_failed_training(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(LAUNCH / "torchrun.sh"), *overrides(tmp_path / "none", tmp_path / "run")]
    done = run(command, PATH=path, PET_NPROC_PER_NODE="1", PET_MAX_RESTARTS="0")
    assert done.returncode == 1
    assert f"error: {tmp_path / 'none'}" in done.stderr
