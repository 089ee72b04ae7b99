"""Killed in the middle of a step of an epoch, and resumed: every bit of a straight run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers import board_of, metrics_of, overrides, tiny_store
from ranks import Ranks

from dist_train.engine.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

TRAINED = Path(__file__).with_name("trained.py")
WORLD, STEPS = 2, 12
# Three steps an epoch, of two micro-batches a process. Checkpoints are after step 4 and 8, of which
# the first is in place by the second one at the latest: the first step of its epoch, and the second
# one of its own.
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
KILLED_IN = 11
CASES = {
    "ddp": ("train.backend=ddp",),
    "zero1, bf16": ("train.backend=zero1", "train.precision=bf16"),
    "zero2": ("train.backend=zero2",),
    "zero3, bf16": ("train.backend=zero3", "train.precision=bf16"),
    "zero3, offload": ("train.backend=zero3", "train.offload=true"),
    "fsdp2, bf16": ("train.backend=fsdp2", "train.precision=bf16"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("resume") / "store")


@pytest.mark.parametrize("more", CASES.values(), ids=CASES)
def test_a_killed_and_resumed_run_equals_the_straight_one(
    more: tuple[str, ...], store: Path, ranks: Ranks, tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    ranks.run_well(WORLD, TRAINED, *overrides(store, straight, *SETTINGS, *more))

    settings = overrides(store, killed, *SETTINGS, *more)
    ended = ranks.run(WORLD, [TRAINED, "--kill-in", KILLED_IN, *settings])
    assert -signal.SIGKILL in ended.codes, ended.said
    assert [line["step"] for line in metrics_of(killed)] == list(range(1, KILLED_IN))
    ranks.run_well(WORLD, TRAINED, "--resume", "auto", *settings)

    sessions = json.loads((killed / "run.json").read_text())["sessions"]
    assert [session["resumed_from_step"] for session in sessions] in ([None, 4], [None, 8])
    mine, theirs = (
        load_checkpoint(run / "checkpoints" / f"step-{STEPS}")[0] for run in (killed, straight)
    )
    assert mine.keys() == theirs.keys()
    assert {name.split("/")[0] for name in mine} == {
        "model",
        "exp_avg",
        "exp_avg_sq",
        "ema",
        "epoch",
    }
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name

    assert [line["step"] for line in metrics_of(killed)] == list(range(1, STEPS + 1))
    assert metrics_of(killed) == metrics_of(straight)
    names = {name for line in metrics_of(straight) for name, value in line.items()
             if "/" in name and value is not None}  # fmt: skip
    assert {"train/loss", "val/loss", "norm/gap"} <= names
    for name in names:
        assert board_of(killed, name) == board_of(straight, name)
    assert [step for step, _ in board_of(killed, "train/loss")] == list(range(1, STEPS + 1))

    snapshots = sorted(path.name for path in (straight / "snapshots").iterdir())
    assert snapshots == ["step-12.safetensors", "step-6.safetensors"]
    for name in snapshots:
        assert (killed / "snapshots" / name).read_bytes() == (
            straight / "snapshots" / name
        ).read_bytes()
