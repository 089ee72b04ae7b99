"""Torn, foreign and missing checkpoints, for a run that is to go on."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from helpers import overrides, tiny_config
from launcher import Launcher
from run_files import DROPOUT, assert_same, checkpoints_of, sessions_of

from dist_train.training.train import train


@pytest.fixture
def left(straight: Path, tmp_path: Path) -> Path:
    """A copy of the run as a kill soon after step 16 would have left it."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step-18")
    return out


def test_what_is_torn_or_of_another_run_is_passed_over(
    launcher: Launcher, store: Path, straight: Path, left: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    train(tiny_config(store, other, "model.width=8", "train.epochs=4"))
    folder = left / "checkpoints"
    shutil.copytree(other / "checkpoints" / "step-24", folder / "step-24")
    shutil.copytree(straight / "checkpoints" / "step-18", folder / "step-18")
    torn = folder / "step-18" / "rank-00001.safetensors"
    os.truncate(torn, torn.stat().st_size - 1)
    (folder / "step-99").mkdir()
    (folder / "step-99" / "pytorch_model.bin").write_bytes(b"not ours")

    group = launcher.run(2, overrides(store, left, DROPOUT), resume=True)
    group.well()
    assert_same(left, straight)
    assert sessions_of(left)[-1] == (2, 16)
    for name, why in (
        ("step-99", "skipped a damaged checkpoint"),
        ("step-24", "skipped a checkpoint"),
        ("step-18", "skipped a damaged checkpoint"),
    ):
        assert any(name in line and why in line for line in group.said(0).splitlines()), name
    assert "model.width is 8 there and 4 here" in group.said(0)
    assert checkpoints_of(left) == [16, 18, 24, 99], "what is not of this run is not ours to remove"


def test_where_none_is_whole_it_does_not_begin_anew(
    launcher: Launcher, store: Path, left: Path
) -> None:
    before = (left / "metrics.jsonl").read_bytes()
    (left / "checkpoints" / "step-16" / "checkpoint.json").write_text("{}")
    group = launcher.run(2, overrides(store, left, DROPOUT), resume=True)
    assert group.codes() == [1, 1], group.said()
    assert "none of the 1 checkpoints is whole" in group.said(0)
    assert "Restore one from a copy" in group.said(0)
    assert (left / "metrics.jsonl").read_bytes() == before


def test_rank_0_chooses_whatever_another_sees(
    launcher: Launcher, store: Path, straight: Path, left: Path, tmp_path: Path
) -> None:
    """Rank 1 is given a disk of its own, where a later checkpoint is. It follows; but what it
    writes there is missed, before the checkpoint counts."""
    apart = tmp_path / "apart"
    shutil.copytree(straight, apart)
    shutil.copytree(left / "checkpoints", apart / "checkpoints", dirs_exist_ok=True)
    assert checkpoints_of(apart) == [16, 18]
    group = launcher.run(
        2, lambda rank: overrides(store, (left, apart)[rank], DROPOUT), resume=True
    )
    assert group.codes() == [1, 1], group.said()
    assert sessions_of(left)[-1] == (2, 16)
    assert "rank-00001.safetensors was written by another process" in group.said(0)
    assert "Give 'out' on a disk that all machines share" in group.said(0)
    assert checkpoints_of(left) == [16]


def test_all_stop_where_one_cannot_read_what_rank_0_chose(
    launcher: Launcher, store: Path, left: Path, tmp_path: Path
) -> None:
    group = launcher.run(
        2, lambda rank: overrides(store, (left, tmp_path / "apart")[rank], DROPOUT), resume=True
    )
    assert group.codes() == [1, 1], group.said()
    assert "process 0 chose this checkpoint, and another cannot read it" in group.said(0)
    assert "(process 1: " in group.said(0)


def test_of_other_runs_alone_none_is_taken_up(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone in its process. The newest says why; that an older one is damaged says nothing."""
    train(tiny_config(store, tmp_path, "train.epochs=1", "snapshots.at=[1]"))
    (tmp_path / "checkpoints" / "step-4" / "checkpoint.json").unlink()
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="another selection"):
        train(tiny_config(store, tmp_path, "seed=1"), resume="auto")
    assert checkpoints_of(tmp_path) == [4, 6]
