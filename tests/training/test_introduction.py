"""What train says: at its beginning, once it knows its speed, and at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import overrides, said, tiny_config

from dist_train.system.cgroup import processes_at_once
from dist_train.training.introduction import MEASURED, Speed, closing, idle_workers


def test_train_says_what_it_does_and_what_comes_next(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = said("train", *overrides(store, out, "train.epochs=4")).splitlines()
    parameters = json.loads((out / "run.json").read_text())["parameters"]
    assert lines[:4] == [
        f"resnet3d-10, {parameters:,} parameters, on 1 x cpu, ddp, fp32",
        "clips: train 12 positive, 28 negative; val 4 positive, 6 negative; "
        "test 4 positive, 6 negative",
        # Of 8 clips 2 are positive; 12 positives an epoch.
        "4 epochs of 6 steps of 8 clips: 192 visits in all, 4 of each positive",
        f"run: {out}",
    ]
    (speed,) = [line for line in lines if " clips/s in steps 5 to 20: " in line]
    assert "at that rate 192 visits take " in speed
    assert speed.endswith(" days)")
    assert lines[-1] == (
        f"next: dist-train predict {out} && dist-train evaluate {out} && dist-train report {out}"
    )


def test_a_run_on_all_clips_is_exported_next(store: Path) -> None:
    config = tiny_config(store, Path("runs/a"), "split.train_on_all=true")
    assert closing(config) == "next: dist-train export runs/a --out a.safetensors"


def test_what_comes_next_can_be_typed_where_a_name_has_blanks(store: Path) -> None:
    config = tiny_config(store, Path("my run"), "split.train_on_all=true")
    assert closing(config) == "next: dist-train export 'my run' --out 'my run.safetensors'"


def test_far_more_workers_than_cpus_are_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = processes_at_once()
    many = tiny_config(store, Path("run"), f"loader.workers={cpus + 1}")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert idle_workers(many) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = idle_workers(many)
    assert told is not None
    assert told.startswith(f"{2 * cpus + 2} loader workers on this machine share {cpus} CPUs")


def test_the_speed_is_told_once() -> None:
    speed = Speed(1000)
    lines = [speed.after_step(4) for _ in range(3 * MEASURED)]
    assert [number for number, line in enumerate(lines, 1) if line is not None] == [MEASURED]
