"""The bench of the loader: tiny real runs of contenders."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import bench_loader
import measuring
import pytest
import torch
from bench_loader import OURS, Bench, make_clips
from bench_remote import RemoteBench
from loader_contenders import Task
from remote_contenders import RemoteTask, run
from torch import Tensor


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench_loader")
    make_clips(folder, 16)
    return Bench(folder, ("ours", "plain files", "original"))


def test_without_peers_webdataset_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def child(self: Bench, name: str, what: str, task: dict[str, Any]) -> dict[str, Any]:
        ran.append(name)
        fixed = {"clips_per_second": 2.0, "first_batch_s": 0.1, "queue_mb": 4.0}
        return fixed | {"pread_gb_s": 2.0, "store_gb_s": 1.0, "peak_mb": 5.0}

    def version(name: str) -> str:
        if name == "webdataset":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(Bench, "child", child)
    monkeypatch.setattr(measuring.importlib.metadata, "version", version)
    figures, size = tmp_path / "figures.json", ["--clips", "8", "--batch", "4", "--quick"]
    command = ["bench_loader.py", "--no-peers", *size, "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", command)
    bench_loader.main()
    result = json.loads(figures.read_text())
    assert result["clips_per_second"].keys() == set(OURS)
    assert result["versions"]["webdataset"] is None
    assert result["summary"]["vs_best_peer"] is None
    assert set(ran) == set(OURS)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_ours_and_plain_files(bench: Bench, resume: bool) -> None:
    task = replace(Task(4, 1, 1, warm_up=1, batches=2), resume=resume)
    for name in ("ours", "plain files"):
        found = bench.child(name, name, asdict(task))
        assert found is not None, bench.cannot
        assert found["first_batch_s"] > 0
        assert found["clips_per_second"] > 0


@pytest.mark.soak
def test_ours_from_a_distant_server(bench: Bench) -> None:
    how = {"latency": 0.001, "mb_s": 1000.0, "stream_mb_s": 1000.0}
    remote = RemoteBench(bench.folder, None, **how)
    assert "LitData" not in remote.contenders
    remote = RemoteBench(bench.folder, None, peers=False, **how)
    assert remote.contenders == ("ours", "ours, native", "ours, local")
    result = remote.measure(Task(4, 1, 1), 0, 1)
    assert not result["cannot"]
    assert result["summary"]["second_epoch_vs_local"] > 0
    assert result["summary"]["remote_vs_best_peer"] is None
    assert all(rate > 0 for rate in result["first_epoch_clips_per_second"].values())


@pytest.mark.parametrize(("asked", "timed"), [([], 0), (["--batches", "2"], 2)])
def test_options_hold_for_a_distant_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], timed: int
) -> None:
    seen: dict[str, int] = {}

    def child(self: Bench, name: str, work: str, task: dict[str, Any]) -> dict[str, Any]:
        seen[name] = task.get("batches", 0)
        return {"clips_per_second": [2.0, 3.0], "processor_ms": [1.0, 1.0]}

    monkeypatch.setattr(Bench, "child", child)
    size = ["--clips", "16", "--batch", "4", "--workers", "1", "--rounds", "1"]
    monkeypatch.setattr(
        sys, "argv", ["bench_loader.py", "--remote", "--no-peers", *size, *asked, "--folder",
                      str(tmp_path)],
    )  # fmt: skip
    bench_loader.main()
    assert seen == dict.fromkeys(("ours", "ours, native", "ours, local"), timed)


def test_only_the_asked_batches_are_timed() -> None:
    def passes(folder: Path, task: RemoteTask) -> Iterator[Iterator[Tensor]]:
        def batches() -> Iterator[Tensor]:
            yield from torch.zeros(2, 1)
            time.sleep(0.5)
            yield torch.zeros(1)

        yield batches()

    rates = [
        run(passes, Path(), RemoteTask(1, 1, 1, batches=asked))["clips_per_second"][0]
        for asked in (0, 1)
    ]
    assert rates[0] <= 4 < rates[1]


@pytest.mark.slow
def test_bare_reading(bench: Bench) -> None:
    found = bench.child("ours", "pread", {"batch": 4, "rounds": 1})
    assert found is not None, bench.cannot
    assert found["store_gb_s"] > 0
    assert found["pread_gb_s"] > 0


@pytest.mark.slow
def test_contender_that_fails_is_told(bench: Bench) -> None:
    assert bench.child("original", "original", asdict(Task(4, 1, 1))) is None
    assert "No such file" in bench.cannot["original"]
