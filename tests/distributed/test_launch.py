"""Several processes on CPUs, over gloo, by ``accelerate launch``; and settings that do not fit.

test_same_numbers.py and test_resume_exactly.py test what the backends compute.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from helpers import (
    LAUNCH,
    SUPPORT,
    launched,
    losses_of,
    metrics_of,
    overrides,
    run_well,
    tiny_config,
    tiny_store,
)
from launcher import Launcher, free_port

from dist_train.checkpoint.format import load_checkpoint
from dist_train.training.train import train

FILE = "cpu_2proc.yaml"
BACKENDS = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
PROBE = SUPPORT / "probe.py"
# Backends add in different orders, and AdamW turns small differences into steps of full size: the
# higher the learning rate, the sooner two runs differ.
STEADY = ("optim.lr=3e-4", "checkpoint.keep_last=9", "norm.shared=false")


def train_two(store: Path, out: Path, backend: str) -> Path:
    """Two processes, started as a user starts them."""
    settings = overrides(store, out, *STEADY, f"train.backend={backend}")
    run_well(launched(FILE, "train", *settings))
    return out


def sessions_of(run: Path) -> list[tuple[str, int, int | None]]:
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    return [(s["backend"], s["world_size"], s["resumed_from_step"]) for s in sessions]


def norms_of(run: Path) -> list[float]:
    return [line["train/grad_norm"] for line in metrics_of(run)]


@pytest.fixture(scope="module")
def ddp(store: Path) -> Path:
    """A straight run of two DDP processes; not to be changed."""
    return train_two(store, store.parent / "ddp", "ddp")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_file(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == "MULTI_GPU"
    assert config.use_cpu == (path.stem == "cpu_2proc")
    assert config.mixed_precision == "no", "train.precision alone decides"
    assert config.num_processes == (2 if path.stem.startswith("cpu") else -1)
    # A fixed port where other machines must find it; a free one elsewhere.
    assert (config.main_process_port == 0) == (path.stem != "gpu_multinode")


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates_two_micro_batches(
    store: Path, ddp: Path, tmp_path: Path
) -> None:
    """The same micro-batches, each with its own BatchNorm statistics, and gradients averaged.

    Not so for the running statistics, which follow rank 0 alone on two processes, nor, therefore,
    for the val metrics.
    """
    train(tiny_config(store, tmp_path, *STEADY, "train.accumulate=2"))
    assert losses_of(tmp_path) == pytest.approx(losses_of(ddp), rel=1e-5)
    assert norms_of(tmp_path) == pytest.approx(norms_of(ddp), rel=1e-4)
    for one, two in zip(metrics_of(tmp_path), metrics_of(ddp), strict=True):
        if "train/auc" in one:
            assert one["train/auc"] == pytest.approx(two["train/auc"], abs=1e-9)


@pytest.mark.slow
def test_two_processes_share_a_checkpoint_of_the_logits_of_both(ddp: Path) -> None:
    """Step 16 is the 4th of its epoch: 4 steps of 8 clips, 2 of them positive."""
    assert sessions_of(ddp) == [("ddp", 2, None)]
    tensors, marker = load_checkpoint(ddp / "checkpoints" / "step-16")
    first, second = marker["files"]
    assert 0.5 < first["size"] / second["size"] < 2
    assert tensors["epoch/logits"].shape == (32,)
    assert tensors["epoch/labels"].sum() == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_autocast_and_not_a_cast(launcher: Launcher, backend: str) -> None:
    said = launcher.program(2, [PROBE, backend]).well().said(0)
    (line,) = [line for line in said.splitlines() if line.startswith("DTYPES ")]
    dtypes = json.loads(line.removeprefix("DTYPES "))
    assert dtypes["computed"] == ["torch.bfloat16"]
    assert dtypes["state"] == ["torch.float32", "torch.int64"]


@pytest.mark.slow
def test_zero_is_launched_as_ddp_is(store: Path, ddp: Path, tmp_path: Path) -> None:
    out = train_two(store, tmp_path / "run", "zero2")
    assert sessions_of(out) == [("zero2", 2, None)]
    assert losses_of(out) == pytest.approx(losses_of(ddp), rel=1e-5)
    assert norms_of(out) == pytest.approx(norms_of(ddp), rel=1e-4)


def test_a_batch_that_cannot_be_cut(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    group = launcher.run(2, overrides(store, tmp_path / "run", "train.accumulate=2"))
    assert group.codes() == [1, 1], group.said()
    for rank in (0, 1):
        said = group.said(rank)
        assert "error" in said
        assert "plan.batch 8 cannot be cut into 2 processes x 2 accumulation" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_told(launcher: Launcher, tmp_path: Path) -> None:
    """Two that both say that they are the first, and one whose partner never comes."""
    settings = overrides(tiny_store(tmp_path / "store"), tmp_path / "run", "train.timeout=2")
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    alone |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for world, env in ((2, {"RANK": "0"}), (1, alone)):
        group = launcher.run(world, settings, **env)
        assert group.codes() == [os.EX_TEMPFAIL] * world, group.said()
        for rank in range(world):
            (line,) = [line for line in group.said(rank).splitlines() if line]
            assert "the 2 processes of the launch did not find each other at 127.0.0.1:" in line
    assert not (tmp_path / "run").exists()
