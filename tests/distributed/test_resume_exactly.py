"""Resumed in the middle of an epoch: every bit of an uninterrupted run, by every backend.

A copy of the uninterrupted run is resumed, without its later checkpoints. The processes of one
backend are really killed, within a step: a kill leaves the same files under every backend.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import SUPPORT, board_of, contents, cut, metrics_of, overrides
from launcher import Launcher

from dist_train.checkpoint.format import load_checkpoint

pytestmark = pytest.mark.slow

TRAINED = SUPPORT / "trained.py"
WORLD, STEPS = 2, 12
# Three steps an epoch, of two micro-batches a process. Checkpoints are after step 4, the first of
# its epoch, and step 8, the second of its epoch.
SETTINGS = (
    "plan.batch=16",
    "train.accumulate=2",
    "train.epochs=4",
    "checkpoint.every_steps=4",
    "snapshots.at=[2, 4]",
    "model.dropout=0.3",
    "norm.precise_steps=2",
    "optim.ema=0.9",
)
KILLED_IN, LEFT_AT = 11, 8
CASES = {
    "ddp": ("train.backend=ddp",),
    "zero1, bf16": ("train.backend=zero1", "train.precision=bf16"),
    "zero2": ("train.backend=zero2",),
    "zero3, offload": ("train.backend=zero3", "train.offload=true"),
    "fsdp2, bf16": ("train.backend=fsdp2", "train.precision=bf16"),
}
DEEPER = {"zero3, bf16": ("train.backend=zero3", "train.precision=bf16")}

KEEP = "checkpoint.keep_last=9"
Straight = Callable[[tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def straight_of(
    store: Path, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Straight:
    """The run of a case that nobody disturbs; made once, and not to be changed."""

    @cache
    def straight_of(more: tuple[str, ...]) -> Path:
        out = tmp_path_factory.mktemp("straight") / "run"
        launcher.program(WORLD, [TRAINED, *overrides(store, out, *SETTINGS, *more, KEEP)]).well()
        return out

    return straight_of


@pytest.mark.parametrize(
    "more",
    [*CASES.values(), *(pytest.param(more, marks=pytest.mark.soak) for more in DEEPER.values())],
    ids=[*CASES, *DEEPER],
)
def test_a_resumed_run_equals_the_straight_one(
    more: tuple[str, ...],
    straight_of: Straight,
    store: Path,
    launcher: Launcher,
    tmp_path: Path,
) -> None:
    straight = straight_of(more)
    resumed = cut(straight, tmp_path / "resumed", after=LEFT_AT)
    settings = overrides(store, resumed, *SETTINGS, *more, KEEP)
    launcher.program(WORLD, [TRAINED, "--resume", "auto", *settings]).well()
    assert sessions_of(resumed) == [None, LEFT_AT]
    assert_equal(resumed, straight)


def test_a_killed_and_resumed_run_equals_the_straight_one(
    straight_of: Straight, store: Path, launcher: Launcher, tmp_path: Path
) -> None:
    more = CASES["zero1, bf16"]
    straight, killed = straight_of(more), tmp_path / "killed"
    settings = overrides(store, killed, *SETTINGS, *more)
    group = launcher.program(WORLD, [TRAINED, "--kill-in", KILLED_IN, *settings])
    assert -signal.SIGKILL in group.codes(), group.said()
    assert [line["step"] for line in metrics_of(killed)] == list(range(1, KILLED_IN))
    launcher.program(WORLD, [TRAINED, "--resume", "auto", *settings]).well()
    # A checkpoint is in place by the next one at the latest.
    assert sessions_of(killed) in ([None, 4], [None, 8])
    assert_equal(killed, straight)


def sessions_of(run: Path) -> list[int | None]:
    """The step that each session went on from."""
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    return [session["resumed_from_step"] for session in sessions]


def assert_equal(run: Path, straight: Path) -> None:
    """Checkpoint, figures and snapshots, to the bit."""
    mine, theirs = (
        load_checkpoint(r / "checkpoints" / f"step-{STEPS}")[0] for r in (run, straight)
    )
    assert mine.keys() == theirs.keys()
    assert {name.split("/")[0] for name in mine} == {
        "model",
        "exp_avg",
        "exp_avg_sq",
        "ema",
        "epoch",
        "judged",
    }
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name

    assert [line["step"] for line in metrics_of(run)] == list(range(1, STEPS + 1))
    assert metrics_of(run) == metrics_of(straight)
    for name in ("train/loss", "val/loss", "norm/gap"):
        assert board_of(run, name) == board_of(straight, name)
    assert [step for step, _ in board_of(run, "train/loss")] == list(range(1, STEPS + 1))

    snapshots = contents(straight / "snapshots")
    assert snapshots.keys() == {"step-12.safetensors", "step-6.safetensors"}
    assert contents(run / "snapshots") == snapshots
