"""Early stopping: when, what is kept, and that a resumed run stops at the same epoch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import STEPS_PER_EPOCH, contents, cut, metrics_of, said, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from short_runs import train_until

from dist_train.checkpoint.format import MARKER, by_step, rank_file, read_marker
from dist_train.config import StopSettings, load_config
from dist_train.errors import ConfigError
from dist_train.run.data import open_data
from dist_train.run.snapshots import load_snapshot
from dist_train.training.early_stop import EarlyStop, keep_best
from dist_train.training.train import train

#: Nothing improves by so much: the first epoch is the best, and the run stops after three.
NEVER = ("stop.metric=val/loss", "stop.patience=2", "stop.min_delta=1000", "train.epochs=5")
STOPPED = 3 * STEPS_PER_EPOCH


@given(
    values=st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3, 0.4]), max_size=12),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.15]),
    lower=st.booleans(),
)
def test_it_stops_when_the_best_is_too_long_ago(
    values: list[float | None], patience: int, min_delta: float, lower: bool
) -> None:
    metric = "val/loss" if lower else "val/auc"
    settings = StopSettings(metric=metric, patience=patience, min_delta=min_delta)
    stop, sign = EarlyStop(settings), -1 if lower else 1
    best, best_at = -1e9, 0
    for epoch, value in enumerate(values, 1):
        score = None if value is None else sign * value
        if score is not None and score - best > min_delta:
            best, best_at = score, epoch
        # As after a resume at each epoch.
        state, stop = stop.state(), EarlyStop(settings)
        stop.load(state)
        assert stop.after_epoch(epoch, value) == (epoch - best_at >= patience)


def test_another_metric_counts_anew() -> None:
    stop = EarlyStop(StopSettings(metric="val/auc", patience=1))
    stop.after_epoch(1, 0.5)
    stop.after_epoch(2, 0.5)
    assert stop.is_due
    other = EarlyStop(StopSettings(metric="val/ap", patience=1))
    other.load(stop.state())
    assert not other.is_due
    assert other.best is None


def test_settings_that_do_not_fit_are_refused(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config(store, out, "stop.metric=val/ap")
    assert config.checkpoint.best == "val/ap"
    with pytest.raises(ConfigError, match="give one metric for both"):
        tiny_config(store, out, "stop.metric=val/ap", "checkpoint.best=val/auc")
    with pytest.raises(ConfigError, match=r"stop\.metric.*no metric 'val/f1'"):
        tiny_config(store, out, "stop.metric=val/f1")
    for named in ("stop.metric", "checkpoint.best"):
        with pytest.raises(ConfigError, match=f"leaves no held-out clips for {named};"):
            tiny_config(store, out, f"{named}=val/ap", "split.train_on_all=true")
        # A metric of a regression.
        with pytest.raises(ConfigError, match=f"^{named}: "):
            open_data(tiny_config(store, out, f"{named}=val/mae"))


@pytest.fixture(scope="module")
def stopped(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that has stopped early, not to be changed, and what it said."""
    out, lines = tmp_path_factory.mktemp("stopped") / "run", []
    more = ("snapshots.at=minima", "optim.ema=0.9", "checkpoint.keep_last=9")
    train(tiny_config(store, out, *NEVER, *more), say=lines.append)
    return out, lines


def test_a_stopped_run_is_finished(stopped: tuple[Path, list[str]]) -> None:
    out, lines = stopped
    assert [line["step"] for line in metrics_of(out)] == list(range(1, STOPPED + 1))
    assert by_step(out / "checkpoints")[-1][0] == STOPPED
    assert any(f"stopped early, after step {STOPPED}: val/loss has not" in line for line in lines)
    (snapshot,) = (out / "snapshots").iterdir()
    losses = {line["step"]: line["val/loss"] for line in metrics_of(out) if "val/loss" in line}
    best = min(losses, key=lambda step: (losses[step], -step))
    assert snapshot.name == f"step-{best}.safetensors"
    assert len(losses) == 3


def test_the_best_weights_are_those_that_were_validated(
    stopped: tuple[Path, list[str]], store: Path, tmp_path: Path
) -> None:
    (snapshot,) = (stopped[0] / "snapshots").iterdir()
    best = int(snapshot.stem.removeprefix("step-"))
    straight = tmp_path / "straight"
    at = f"snapshots.at=[{best // STEPS_PER_EPOCH}]"
    train_until(tiny_config(store, straight, "train.epochs=5", "optim.ema=0.9", at), best)
    own, expected = load_snapshot(snapshot), load_snapshot(straight / "snapshots" / snapshot.name)
    assert own.facts == expected.facts
    assert own.weights.keys() == expected.weights.keys()
    for name, tensor in own.weights.items():
        assert torch.equal(tensor, expected.weights[name]), name


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_best_checkpoint_is_told_and_set_aside(
    stopped: tuple[Path, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damaged: int,
) -> None:
    """The next best is saved; if there is none, the weights that the run ends with are."""
    out = cut(stopped[0], tmp_path / "run", after=10**9)
    config = load_config(out / "config.yaml", [f"out={out}"])
    losses = {line["step"]: line["val/loss"] for line in metrics_of(out) if "val/loss" in line}
    best, second = sorted(losses.keys() - {STOPPED}, key=lambda step: losses[step])
    shutil.rmtree(out / "snapshots")
    for step in (best, second)[:damaged]:
        (out / "checkpoints" / f"step-{step}" / rank_file(0)).write_bytes(b"torn")
    assert keep_best(config, STOPPED, None, "content") is (damaged == 2)
    left = [] if damaged == 2 else [f"step-{second}.safetensors"]
    assert [path.name for path in (out / "snapshots").glob("*")] == left
    assert caplog.text.count("the best checkpoint is damaged, and is now") == damaged
    assert (out / "superseded" / f"step-{best}").is_dir()
    assert not (out / "checkpoints" / f"step-{best}").exists()


def test_a_damaged_marker_of_the_best_checkpoint_is_told(
    stopped: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = cut(stopped[0], tmp_path / "run", after=10**9)
    config = load_config(out / "config.yaml", [f"out={out}"])
    losses = {line["step"]: line["val/loss"] for line in metrics_of(out) if "val/loss" in line}
    best = min(losses.keys() - {STOPPED}, key=lambda step: losses[step])
    (out / "checkpoints" / f"step-{best}" / MARKER).write_text("torn")
    keep_best(config, STOPPED, None, "content")
    assert caplog.text.count("a checkpoint is damaged, and cannot be the best") == 1
    assert (out / "checkpoints" / f"step-{best}").exists()


def test_auto_says_that_a_stopped_run_is_done(
    stopped: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = cut(stopped[0], tmp_path / "run", after=10**9)
    before = contents(out)
    printed = said("train", "--config", out / "config.yaml", f"out={out}", "--resume", "auto")
    assert "stopped early, after step" in printed
    assert "The run is finished" in printed
    assert contents(out).keys() == before.keys()
    assert contents(out / "checkpoints") == contents(stopped[0] / "checkpoints")


def test_a_resumed_run_stops_at_the_same_epoch(
    stopped: tuple[Path, list[str]], store: Path, tmp_path: Path
) -> None:
    out = cut(stopped[0], tmp_path / "run", after=2 * STEPS_PER_EPOCH)
    config = load_config(out / "config.yaml", [f"out={out}"])
    train(config, resume="auto")
    assert metrics_of(out) == metrics_of(stopped[0])
    assert contents(out / "snapshots") == contents(stopped[0] / "snapshots")
    last: dict[str, Any] = read_marker(out / "checkpoints" / f"step-{STOPPED}")["facts"]["stop"]
    assert last["waited"] == 2


def test_more_patience_goes_on(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = cut(stopped[0], tmp_path / "run", after=10**9)
    (best,) = (out / "snapshots").iterdir()
    config = load_config(out / "config.yaml", [f"out={out}", "stop.patience=9"])
    train(config, resume="auto")
    last = 5 * STEPS_PER_EPOCH
    assert metrics_of(out)[-1]["step"] == last
    # Predictions average over all snapshots.
    assert [path.name for path in (out / "snapshots").iterdir()] == [f"step-{last}.safetensors"]
    assert any((out / "superseded").rglob(best.name))
