"""The rows of the bench are settings that exist, and its timed steps stand for an epoch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_step
import numpy as np
import pytest
from helpers import ROOT, environment

from dist_train.config import load_config


@pytest.mark.parametrize("variant", bench_step.ALL, ids=lambda variant: variant.name)
def test_a_row_is_a_config(variant: bench_step.Variant) -> None:
    assert bench_step.config_of(variant, "resnet3d-10").model.name == "resnet3d-10"


def test_the_original_row_trains_as_the_original_recipe_does() -> None:
    row = bench_step.config_of(bench_step.BY_NAME["original"], "resnet3d-101")
    recipe = load_config(ROOT / "configs" / "clog_loss_seed.yaml")
    assert (row.train.precision, row.train.channels_last) == ("fp32", False)
    for section, names in {
        "train": ("precision", "channels_last"),
        "plan": ("batch", "order", "negatives", "ratio"),
        "model": ("name", "width", "recompute", "stem_folded"),
        "optim": ("fused",),
    }.items():
        for name in names:
            assert getattr(getattr(row, section), name) == getattr(getattr(recipe, section), name)


def test_timed_steps_are_as_deep_as_the_epoch_is() -> None:
    load = bench_step.Workload(bench_step.challenge_clips(), "resnet3d-10", 0.25, 4, 2)
    for name, expected in (("original", (0.70, 0.80)), ("fast", (0.98, 1.0))):
        config = bench_step.config_of(bench_step.BY_NAME[name], "resnet3d-10")
        epoch = load.epoch(config)
        assert expected[0] <= bench_step.efficiency(epoch) <= expected[1]
        timed = [bench_step.padded(d) for turn in load.turns(config) for d in turn]
        assert len(timed) == 8
        assert np.mean(timed) == pytest.approx(
            np.mean([bench_step.padded(d) for d in epoch]), rel=0.1
        )


@pytest.mark.slow
def test_it_measures_rows_in_turns_and_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, "tools/bench_step.py", "--quick", "--model", "resnet3d-10"]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["failed"] == {}
    assert set(result["variants"]) == {"original", "fast"}
    assert all(value > 0 for value in result["summary"].values())
    for row in result["variants"].values():
        parts = sum(row["ms"][part] for part in ("forward", "backward", "optimizer"))
        assert parts == pytest.approx(row["ms"]["seconds"], rel=0.05)
        assert row["peak_bytes"] > 0
