"""Costs by hand from figures that are given, and what is refused.

That figures are found where tools/gpu.py writes them is in test_gpu.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cost
import pytest
from gpu_record import RESULTS

from dist_train.config import Config, load_config


def config(*settings: str) -> Config:
    return load_config(None, ["store=none", *settings])


def figures(*rows: cost.Row) -> cost.Figures:
    return cost.Figures("NVIDIA H200", rows, {False: 400.0}, 2.0, 10**6, 1e9)


def test_seconds_and_bytes_are_those_worked_out_by_hand() -> None:
    settings = config("plan.batch=64", "checkpoint.every_steps=500")
    known = figures(cost.Row("fast", config("plan.batch=8"), 100.0))
    found = cost.cost_of(cost.Recipe("ours", settings), known, nodes=2, per_node=4, visits=64_000)
    assert isinstance(found, cost.Cost)
    # 1,000 steps; 8 devices at 100 clips/s; 2 nodes at 400; a checkpoint costs 2 s.
    assert found.compute == pytest.approx(80)
    assert found.loader == pytest.approx(80)
    assert found.exchange == pytest.approx(1000 * 2 * 7 / 8 * 4e6 / 1e9)
    assert found.checkpoints == pytest.approx(4)
    assert found.written == pytest.approx(2 * 12e6)
    assert found.seconds == pytest.approx(80 + 7 + 4)


def test_a_config_is_priced_by_the_row_that_trains_as_it_does() -> None:
    known = figures(
        cost.Row("four", config("plan.batch=4"), 10.0),
        cost.Row("sixteen", config("plan.batch=16"), 20.0),
        cost.Row("cheap", config("plan.batch=16", "model.recompute=cheap"), 15.0),
    )
    assert known.row(config(), 4).name == "four"
    assert known.row(config(), 64).name == "sixteen"
    assert known.row(config("model.recompute=cheap"), 4).name == "cheap"
    # The rate is that of the device, the loader's that of the way it loads.
    with pytest.raises(cost.NotMeasuredError, match=r"'four', but for model\.recompute"):
        known.row(config("model.recompute=block"), 4)
    native = cost.Recipe("native", config("plan.batch=16", "augment.device=true"))
    with pytest.raises(cost.NotMeasuredError, match="the loader was not measured"):
        cost.cost_of(native, known, 1, 1, 100)


def test_a_batch_that_cannot_be_cut_is_told() -> None:
    assert cost.cost_of(cost.Recipe("ours", config("plan.batch=4")), figures(), 1, 8, 100) == (
        8,
        "plan.batch 4 is no multiple of 32",
    )


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ({"rows": ()}, "gpu.py bench"),
        ({"loader": {}}, "gpu.py bench"),
        ({"stall": None}, "gpu.py bench"),
        ({"link": None}, "bench_scaling"),
    ],
)
def test_what_was_not_measured_is_refused_with_what_measures_it(
    missing: dict[str, object], command: str
) -> None:
    known = figures(cost.Row("fast", config("plan.batch=8"), 100.0))
    recipe = cost.Recipe("ours", config("plan.batch=64"))
    with pytest.raises(cost.NotMeasuredError, match=command):
        cost.cost_of(recipe, replace(known, **missing), 1, 8, 100)  # type: ignore[arg-type]


def test_figures_of_another_device_are_refused(tmp_path: Path) -> None:
    file = tmp_path / RESULTS
    with pytest.raises(cost.NotMeasuredError, match="nothing was measured on h200"):
        cost.read_figures(file, "h200")
    file.write_text(json.dumps({"stage": "machine", "name": "machine", "card": "NVIDIA H200"}))
    assert cost.read_figures(file, "h200").rows == ()
    with pytest.raises(cost.NotMeasuredError, match="is of NVIDIA H200, not of a100"):
        cost.read_figures(file, "a100")
