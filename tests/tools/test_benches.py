"""Quick real runs of benches."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs a bench in this process with some options, and returns its results."""

    def run(name: str, *options: object) -> dict[str, Any]:
        results = tmp_path / "results.json"
        argv = [name, "--quick", "--json", *map(str, [results, *options])]
        monkeypatch.setattr(sys, "argv", argv)
        importlib.import_module(name).main()
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    return run


@pytest.mark.slow
def test_augment(bench: Bench) -> None:
    result = bench("bench_augment")
    assert result["rows"].keys() == {"all at once", "recipe"}
    assert all(value > 0 for value in result["summary"].values())


@pytest.mark.slow
def test_check(bench: Bench) -> None:
    summary = bench("bench_check")["summary"]
    assert 0 < summary["clips_per_s_read_and_measured"] < summary["clips_per_s_read"]
    assert all(value == 1 for name, value in summary.items() if name.startswith("hashes_found"))
    assert summary["columns_tried_apart"] == summary["columns_tried_mixed"] == 10


@pytest.mark.slow
def test_plan(bench: Bench, tmp_path: Path) -> None:
    depths = tmp_path / "depths.csv"
    rows = [f"{depth},{100_000 // depth},{1000 // depth}\n" for depth in range(20, 60)]
    depths.write_text("num_frames,all,micro_stalled\n" + "".join(rows))
    summary = bench("bench_plan", "--depths", depths)["summary"]
    assert summary["random_8x4"] < summary["efficiency_8x4"] <= summary["bound_8x4"] <= 1


@pytest.mark.slow
def test_table(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench_table.PROCESSES", 1)
    summary = bench("bench_table", "--folder", tmp_path)["summary"]
    assert summary["worker_pickle_kb"] < 10
    assert summary["extra_mb_573k"] < summary["index_extra_mb_573k"]
    assert summary["open_s_573k"] < summary["index_open_s_573k"] / 10
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_measures_every_kind_of_save_and_leaves_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--model", "resnet3d-10", "--width", "8", "--folder", disk]
    result = bench("bench_checkpoint", *options)
    assert {"stall_vs_torch_save", "stall_vs_accelerate", "stall_vs_dcp"} <= result[
        "summary"
    ].keys()
    for name in ("asynchronous", "dcp", "torch_save", "accelerate"):
        rounds = result["rounds"][name]
        assert len(rounds["stall"]) == 3
        pairs = zip(rounds["stall"], rounds["durable"], strict=True)
        assert all(0 < stall <= durable for stall, durable in pairs), name
        assert all(seconds > 0 for seconds in result["resume_s"][name])
    # Three float32 numbers a weight, and BatchNorm's buffers.
    assert result["model"]["state_bytes"] > 3 * 4 * 10_000
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_models_are_counted_and_timed(bench: Bench) -> None:
    result = bench("bench_models", "--models", "resnet3d-10,mobilenet3d")
    assert result["failed"] == {}
    rows = result["models"]
    assert rows["resnet3d-10"]["flops"] > 1e8
    for figure in ("flops", "parameters"):
        assert 0 < rows["mobilenet3d"][figure] < rows["resnet3d-10"][figure]
    for row in rows.values():
        # Weights and gradients alone.
        assert row["peak_bytes"] > 2 * 4 * row["parameters"]
        assert row["clips_per_s"] > 0


TINY = ("--width", "4", "--frames", "4", "--side", "32")


@pytest.mark.slow
def test_scaling_explains_the_whole_step(bench: Bench) -> None:
    result = bench("bench_scaling", "--worlds", "1", "2", "--model", "resnet3d-10", *TINY)
    assert [line["case"] for line in result["lines"]] == ["1x4", "2x4", "1x8", "2x4"]
    assert {"efficiency_weak_2", "efficiency_strong_2"} <= result["summary"].keys()
    for case, parts in result["parts"].items():
        named = ("data", "compute", "wait", "statistics", "gradients", "rest")
        assert parts["step_s"] == pytest.approx(sum(parts[f"{name}_s"] for name in named)), case
        # Parts are measured one by one: on a busy machine one can take longer than the whole.
        assert parts["compute_s"] > 0
        assert parts["data_s"] > 0
        assert len(parts["samples_s"]) == 4 * int(case.partition("x")[0])
        assert set(parts["noise_s"]) == {*named, "exchange"}
    two = result["parts"]["2x4"]
    assert two["exchange_s"] > 0
    # The stem, two in each of four blocks, and three shortcuts, forward and backward.
    assert len(two["statistics_bytes"]) == 2 * (1 + 2 * 4 + 3)
    assert two["all_reduce_s"]["small"] < two["all_reduce_s"]["large"]


@pytest.mark.slow
def test_scaling_shows_why_a_process_failed(bench: Bench) -> None:
    with pytest.raises(SystemExit, match=r"process 0 of 1 failed(.|\n)*no model 'resnet3d-11'"):
        bench("bench_scaling", "--worlds", "1", "--model", "resnet3d-11", *TINY)
