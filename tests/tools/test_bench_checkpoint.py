"""A real run at a tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_well


@pytest.mark.slow
def test_it_measures_every_kind_of_save_and_leaves_nothing(tmp_path: Path) -> None:
    figures, disk = tmp_path / "figures.json", tmp_path / "disk"
    disk.mkdir()
    settings = ["--model", "resnet3d-10", "--width", "8", "--quick", "--folder", disk]
    tool = ROOT / "tools" / "bench_checkpoint.py"
    printed = run_well([sys.executable, *map(str, [tool, *settings, "--json", figures])])
    assert "torch.save" in printed
    result = json.loads(figures.read_text())
    assert {"stall_vs_torch_save", "stall_vs_accelerate", "stall_vs_dcp"} <= result[
        "summary"
    ].keys()
    for name in ("asynchronous", "dcp", "torch_save", "accelerate"):
        rounds = result["rounds"][name]
        assert len(rounds["stall"]) == 3
        pairs = zip(rounds["stall"], rounds["durable"], strict=True)
        assert all(0 < stall <= durable for stall, durable in pairs), name
        assert all(seconds > 0 for seconds in result["resume_s"][name])
    # Three float32 numbers a weight, and what BatchNorm keeps.
    assert result["model"]["state_bytes"] > 3 * 4 * 10_000
    assert list(disk.iterdir()) == []
