"""A real, quick run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_well


@pytest.mark.slow
def test_a_quick_run_times_two_rows(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    tool = str(ROOT / "tools" / "bench_augment.py")
    run_well([sys.executable, tool, "--quick", "--json", str(figures)])
    result = json.loads(figures.read_text())
    assert result["rows"].keys() == {"all at once", "recipe"}
    assert all(value > 0 for value in result["summary"].values())
