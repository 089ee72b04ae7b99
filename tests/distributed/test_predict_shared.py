"""``dist-train predict`` under a launcher: the processes share the clips, and rank 0 writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import SUPPORT, contents, tiny_config, tiny_store
from launcher import Group, Launcher

from dist_train.training.train import train

PROGRAM = SUPPORT / "predicted.py"
WRITTEN = ("predictions.csv", "submission.csv")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of micro-batches of 4 clips, of 8 a step; not to be changed."""
    folder = tmp_path_factory.mktemp("shared")
    train(tiny_config(tiny_store(folder / "store"), folder / "run", "train.accumulate=2"))
    return folder / "run"


def predict(launcher: Launcher, world: int, run: Path, notes: Path, *more: object) -> Group:
    return launcher.program(world, [PROGRAM, notes, "predict", run, *more])


def notes_of(folder: Path, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def test_processes_share_the_clips_and_write_what_one_writes(
    launcher: Launcher, trained: Path, tmp_path: Path
) -> None:
    runs = {world: tmp_path / f"run-{world}" for world in (1, 2)}
    noted = {}
    for world, run in runs.items():
        shutil.copytree(trained, run)
        group = predict(launcher, world, run, tmp_path / f"notes-{world}").well()
        noted[world] = notes_of(tmp_path / f"notes-{world}", world)
        assert group.said(0).count("predictions in") == 1
    assert "predictions in" not in group.said(1)
    for name in WRITTEN:
        assert (runs[1] / name).read_bytes() == (runs[2] / name).read_bytes()
    # 20 held-out clips by 4, and two snapshots. Never 8, which is a step's.
    (alone,) = noted[1]
    assert alone["seen"] == [4] * 10
    assert [rank["seen"] for rank in noted[2]] == [[4] * 6, [4] * 4]
    # Each is read once, for both snapshots and by one process.
    table = pd.read_csv(runs[1] / "predictions.csv")
    for ranks in noted.values():
        read = [clip for rank in ranks for clip in rank["read"]]
        assert sorted(set(read)) == sorted(read)
        assert len(read) == len(table) == 20
    # Process 1 writes nothing.
    opened = [[path for path in rank["opened"] if str(runs[2]) in path] for rank in noted[2]]
    assert opened[0]
    assert opened[1] == []


def test_a_clip_that_one_process_cannot_read_ends_all_and_nothing_is_written(
    launcher: Launcher, trained: Path, tmp_path: Path
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(trained.with_name("store"), store)
    shutil.copytree(trained, run)
    shard = next(iter(sorted((store / "shards").glob("*.tar"))))
    content = bytearray(shard.read_bytes())
    content[-12000:-11000] = bytes(1000)
    shard.write_bytes(content)
    before = contents(run)
    group = predict(launcher, 2, run, tmp_path / "notes", "--store-path", store)
    codes = group.codes()
    assert all(codes), group.said()
    assert "cannot be read" in group.said()
    assert "Traceback" not in group.said()
    assert contents(run) == before
