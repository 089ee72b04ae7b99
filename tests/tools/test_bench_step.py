"""The rows of the bench are settings that exist, and its timed steps stand for an epoch."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any

import bench_step
import numpy as np
import pytest
import torch
from helpers import ROOT
from roofline import Ceilings

from dist_train.config import Config, load_config

FLOPS = {"fp32": 1.0, "bf16": 2.0}


@pytest.mark.parametrize("name", bench_step.VARIANTS)
def test_a_row_is_a_config(name: str) -> None:
    assert bench_step.config_of(name, "resnet3d-10").model.name == "resnet3d-10"


def test_the_original_row_trains_as_the_original_recipe_does() -> None:
    row = bench_step.config_of("original", "resnet3d-101")
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
        config = bench_step.config_of(name, "resnet3d-10")
        epoch = load.epoch(config)
        assert expected[0] <= bench_step.efficiency(epoch) <= expected[1]
        timed = [bench_step.padded(d) for turn in load.turns(config) for d in turn]
        assert len(timed) == 8
        assert np.mean(timed) == pytest.approx(
            np.mean([bench_step.padded(d) for d in epoch]), rel=0.1
        )


class Rows:
    """Stands for ``RowProcess``: the fourth turn of a row is interrupted."""

    def __init__(self, config: Config) -> None:
        self.turns = 0
        self.built: Future[None] = Future()
        self.built.set_result(None)

    def close(self) -> None: ...

    def turn(self, steps: list[Any]) -> bench_step.Turn:
        self.turns += 1
        if self.turns == 4:
            raise KeyboardInterrupt
        return bench_step.Turn(2.0, 1.0, 0.5, 0.5, 10, [depths.tolist() for depths in steps])


def test_a_killed_bench_keeps_its_finished_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "RowProcess", Rows)
    monkeypatch.setattr(bench_step, "measure_ceilings", lambda *_: Ceilings(FLOPS, 1.0))
    load = bench_step.Workload(bench_step.challenge_clips(), "resnet3d-10", 0.1, 3, 1)
    kept: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        bench_step.measure(load, ("original", "fast"), "given", kept.append)
    assert [len(result["turns"]["fast"]) for result in kept] == [1, 2]
    last = json.loads(json.dumps(kept[-1]))
    assert last["variants"]["fast"]["ms"]["seconds"] == pytest.approx(2000)
    assert last["summary"]["clips_per_second"] > 0
    # Operations are counted at the end.
    assert last["summary"]["roofline_share"] is None


def test_rows_of_two_precisions_run_in_one_process() -> None:
    turns = []
    for precision in ("bf16", "fp32"):
        tiny = ["model.width=4", "clip.size=[32, 32]", f"train.precision={precision}"]
        row = bench_step.Row(bench_step.config_of("fast", "resnet3d-10", tiny))
        assert row.backend.accelerator.mixed_precision == {"bf16": "bf16", "fp32": "no"}[precision]
        turns.append(row.turn([np.full(4, 6)]))
        row.close()
    assert all(turn.seconds > 0 for turn in turns)


def test_memory_of_cuda_graphs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reserved, but does not count as allocated."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    with bench_step.peak_memory(torch.device("cuda")) as peak:
        pass
    assert peak == [7]


@pytest.mark.slow
def test_rows_take_turns_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real rows of very shallow clips. Ceilings are given, as measuring them takes long."""
    ceilings = Ceilings({"fp32": 1e12, "bf16": 2e12}, 1e10)
    monkeypatch.setattr(bench_step, "measure_ceilings", lambda *_: ceilings)
    load = bench_step.Workload(bench_step.challenge_clips(), "resnet3d-10", 0.03, 1, 1)
    result = bench_step.measure(load, ("original", "fast"), "given", lambda result: None)
    assert result["failed"] == {}
    assert set(result["variants"]) == {"original", "fast"}
    assert all(value > 0 for value in result["summary"].values())
    for row in result["variants"].values():
        parts = sum(row["ms"][part] for part in bench_step.PARTS[1:])
        assert parts == pytest.approx(row["ms"]["seconds"], rel=0.05)
        assert row["peak_bytes"] > 0


def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(self: Rows, steps: list[Any]) -> bench_step.Turn:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Rows, "turn", turn)
    monkeypatch.setattr(bench_step, "RowProcess", Rows)
    monkeypatch.setattr(bench_step, "measure_ceilings", lambda *_: Ceilings(FLOPS, 1.0))
    load = bench_step.Workload(bench_step.challenge_clips(), "resnet3d-10", 0.1, 1, 1)
    result = bench_step.measure(load, ("original",), "given", lambda result: None)
    assert result["failed"] == {"original": "RuntimeError: out of memory"}
    assert result["variants"] == {}
