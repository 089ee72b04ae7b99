"""SIGKILL of any rank: the launcher starts the run again, and it ends as if nothing happened."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults import KilledPublishing, KilledWriting, Runs, Signal
from helpers import LAUNCH, ROOT, environment, losses_of, metrics_of, overrides, tiny_config
from launcher import Group, Launcher
from run_files import DROPOUT, assert_same, sessions_of

from dist_train.training.train import train


def test_each_rank_is_killed_and_the_launcher_goes_on(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, after one, and in the last epoch."""
    faults = [Signal(0, 2, "a"), Signal(1, 6, "b"), Signal(0, 14, "c")]
    group = launcher.elastic(overrides(store, tmp_path / "run", DROPOUT), faults=faults)
    group.well()
    assert_same(tmp_path / "run", straight)
    begun = [step for _, step in sessions_of(tmp_path / "run")]
    assert begun[:2] == [None, None]
    assert begun[2] in (None, 4), begun
    assert begun[3] in (8, 12), begun
    assert len(begun) == 4


def test_killed_while_a_checkpoint_is_written(
    launcher: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    """The 4th's share is half there; the 8th is all there, but for its name. Neither counts."""
    faults = [KilledWriting(1, 3, "writing"), KilledPublishing(0, 7, "publishing")]
    out = tmp_path / "run"
    launcher.elastic(overrides(store, out, DROPOUT), faults=faults).well()
    assert_same(out, straight)
    assert [step for _, step in sessions_of(out)] == [None, None, 4]
    assert not list((out / "checkpoints").glob("*.partial"))


def test_a_process_without_a_launcher(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "run"
    more = (DROPOUT, "train.precision=bf16", "optim.lr=3e-3", "norm.precise_steps=2")
    launcher.run(1, overrides(store, straight, *more)).well()
    group = launcher.run(1, overrides(store, out, *more), faults=[Signal(0, 9)])
    assert group.codes() == [-9], group.said()
    assert len(metrics_of(out)) == 9
    launcher.run(1, overrides(store, out, *more), resume=True).well()
    assert_same(out, straight)
    assert sessions_of(out)[1] in [(1, 8), (1, 4)], "of the last checkpoint, if it was in place"


def test_fewer_ranks_go_on_where_the_batch_can_be_cut(
    launcher: Launcher, store: Path, tmp_path: Path
) -> None:
    """One of 4 ranks dies: 3 are refused, and 2 go on."""
    settings = ("plan.batch=16", "train.epochs=3", "optim.lr=3e-4")
    out = tmp_path / "run"
    group = launcher.run(4, overrides(store, out, *settings), faults=[Signal(2, 6)])
    assert group.codes() == [75, 75, -9, 75], group.said()
    for rank in (0, 1, 3):
        assert "another process of the run has ended" in group.said(rank)
        assert "Go on by --resume auto" in group.said(rank)
        assert "Traceback" not in group.said(rank)
    three = launcher.run(3, overrides(store, out, *settings), resume=True)
    assert three.codes() == [1, 1, 1], three.said()
    assert "error: plan.batch 16 cannot be cut into 3 processes" in three.said(0)
    launcher.run(2, overrides(store, out, *settings), resume=True).well()
    assert sessions_of(out) == [(4, None), (2, 4)]


def test_a_node_is_lost_and_the_launcher_of_the_other_goes_on(
    launcher: Launcher, store: Path, tmp_path: Path
) -> None:
    """Two nodes of 2 ranks. The second goes, with its launcher, while all are at step 6. At any
    number of ranks the losses are those of one process."""
    settings = ("plan.batch=16", "train.epochs=6", "optim.lr=3e-4")
    straight, out, go = tmp_path / "straight", tmp_path / "run", tmp_path / "go"
    train(tiny_config(store, straight, *settings))
    wait = Runs(None, 6, "wait", command=f"until [ -e {go} ]; do sleep 0.02; done")
    group = launcher.elastic(
        overrides(store, out, *settings), faults=[wait], nodes=2, struck=tmp_path / "struck"
    )
    struck = tmp_path / "struck"
    group.wait_for(lambda: len(list(struck.glob("wait.*"))) == 4)
    group.kill([group.pids[1]])
    go.touch()
    left = Group(launcher, group.pids[:1], group.logs[:1])
    left.well()
    assert sessions_of(out) == [(4, None), (2, 4)]
    assert losses_of(out) == pytest.approx(losses_of(straight), rel=1e-4)


def test_a_rank_is_killed_under_torchrun(store: Path, straight: Path, tmp_path: Path) -> None:
    """By the file that users start, which starts its processes anew."""
    out = tmp_path / "run"
    env = environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        PET_NPROC_PER_NODE="2",
    )
    with (tmp_path / "log").open("w") as log:
        process = psutil.Popen(
            [str(LAUNCH / "torchrun.sh"), *overrides(store, out, DROPOUT, "train.epochs=3")],
            cwd=ROOT, env=env, stdout=log, stderr=log,
        )  # fmt: skip
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 5):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        (worker,) = [p for p in process.children(recursive=True) if p.environ().get("RANK") == "1"]
        worker.kill()
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert_same(out, straight)
    (_, first), (_, second) = sessions_of(out)
    assert first is None
    assert second is not None
