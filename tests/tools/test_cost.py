"""Costs by hand from figures that are given, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cost
import pytest

from dist_train.config import load_config

RATES = {"original": {"clips_per_second": 5.0}, "fast": {"clips_per_second": 100.0}}


def leave(folder: Path, **others: Any) -> Path:
    """The JSON files of the benches in a folder."""
    folder.mkdir(exist_ok=True)
    step = {
        "machine": {"device": "cuda", "gpu": "NVIDIA H200"},
        "workload": {"frames_scale": 1.0, "parameters": 10**6},
        "variants": RATES,
    }
    for name, content in {"step": step, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


ALL = {
    "loader": {"summary": {"clips_per_second": 400.0}},
    "checkpoint": {"summary": {"stall_s": 0.5, "slowdown_s": 1.5}},
    "scaling": {"summary": {"link_gb_per_second": 1.0}},
}


def recipe(*settings: str) -> cost.Recipe:
    return cost.Recipe("ours", "fast", load_config(None, ["store=none", *settings]))


def test_seconds_and_bytes_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    figures = cost.read_figures(leave(tmp_path, **ALL), "h200")
    ours = recipe("plan.batch=64", "checkpoint.every_steps=500")
    found = cost.cost_of(ours, figures, nodes=2, per_node=4, visits=64_000)
    assert isinstance(found, cost.Cost)
    # 1,000 steps; 8 devices at 100 clips/s; 2 nodes at 400; a checkpoint costs 2 s.
    assert found.compute == pytest.approx(80)
    assert found.loader == pytest.approx(80)
    assert found.exchange == pytest.approx(1000 * 2 * 7 / 8 * 4e6 / 1e9)
    assert found.checkpoints == pytest.approx(4)
    assert found.written == pytest.approx(2 * 12e6)
    assert found.seconds == pytest.approx(80 + 7 + 4)


def test_a_batch_that_cannot_be_cut_is_told(tmp_path: Path) -> None:
    figures = cost.read_figures(leave(tmp_path, **ALL), "h200")
    assert cost.cost_of(recipe("plan.batch=4"), figures, 1, 8, 100) == (
        8,
        "plan.batch 4 is no multiple of 32",
    )


@pytest.mark.parametrize(
    ("missing", "command"),
    [("loader", "bench_loader"), ("checkpoint", "bench_checkpoint"), ("scaling", "bench_scaling")],
)
def test_what_was_not_measured_is_refused_with_what_measures_it(
    tmp_path: Path, missing: str, command: str
) -> None:
    others = {name: content for name, content in ALL.items() if name != missing}
    figures = cost.read_figures(leave(tmp_path, **others), "h200")
    with pytest.raises(cost.NotMeasuredError, match=command):
        cost.cost_of(recipe("plan.batch=64"), figures, 1, 8, 100)


def test_figures_of_another_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cost.NotMeasuredError, match="no step was measured on h200"):
        cost.read_figures(tmp_path, "h200")
    with pytest.raises(cost.NotMeasuredError, match="is of NVIDIA H200, not of a100"):
        cost.read_figures(leave(tmp_path, **ALL), "a100")
