"""A real run of one and two processes at a tiny size, and how a failure in one of them ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run, run_well

TOOL = [sys.executable, str(ROOT / "tools" / "bench_scaling.py")]
TINY = ["--width", "4", "--frames", "4", "--side", "32", "--quick"]


@pytest.mark.slow
def test_the_parts_of_a_step_are_all_of_it(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    settings = ["--worlds", "1", "2", "--model", "resnet3d-10", *TINY]
    run_well([*TOOL, *settings, "--json", str(figures)])
    result = json.loads(figures.read_text())
    assert [line["case"] for line in result["lines"]] == ["1x4", "2x4", "1x8", "2x4"]
    summary = result["summary"]
    assert {"efficiency_weak_2", "efficiency_strong_2"} <= summary.keys()
    for case, parts in result["parts"].items():
        named = ("data", "compute", "wait", "statistics", "gradients", "rest")
        assert parts["step_s"] == pytest.approx(sum(parts[f"{name}_s"] for name in named)), case
        # Each is measured by itself: on a busy machine a part can take longer than the whole.
        assert parts["compute_s"] > 0
        assert parts["data_s"] > 0
        ranks = int(case.partition("x")[0])
        assert len(parts["samples_s"]) == 4 * ranks
        assert set(parts["noise_s"]) == {*named, "exchange"}
        assert all(value >= 0 for value in parts["noise_s"].values())
    two = result["parts"]["2x4"]
    assert two["exchange_s"] > 0
    # The stem, two in each of four blocks, and three shortcuts, each forwards and backwards.
    assert len(two["statistics_bytes"]) == 2 * (1 + 2 * 4 + 3)
    assert two["all_reduce_s"]["small"] < two["all_reduce_s"]["large"]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_is_shown() -> None:
    done = run([*TOOL, "--worlds", "1", "--model", "resnet3d-11", *TINY])
    assert done.returncode == 1
    assert "process 0 of 1 failed" in done.stderr
    assert "there is no model 'resnet3d-11'" in done.stderr
