"""A tiny store, a tiny run, and the command line as a user types it."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train import cli
from dist_train.config import AugmentSettings, Config, dump_config, last_of_each, load_config
from dist_train.data.store.build import prepare_npz
from dist_train.progress import Progress
from dist_train.run.record import _write_record, read_record

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
LAUNCH = ROOT / "launch"
# Positives and negatives of each split of the tiny store: 6 steps an epoch at batch 8, and 1:3.
SPLITS = {"train": (12, 28), "val": (4, 6), "test": (4, 6)}
STEPS_PER_EPOCH = 6
# The settings of augmentation that are a probability of a change of one clip.
CHANGES = AugmentSettings(preset="original").model_fields_set - {"preset"}
# What depends on the clock or the machine, not on the arithmetic.
UNSTEADY = ("time", "speed/", "memory/", "crc32c")


def image_files() -> list[str]:
    """Files and folders of the repository that the Dockerfile copies into the image."""
    lines = map(str.split, (ROOT / "Dockerfile").read_text().splitlines())
    return [name for line in lines if line[:1] == ["COPY"] for name in line[1:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tiny_npz(path: Path, *, seed: int = 0) -> Path:
    """A file in MedMNIST's form: 60 clips of 8x16x16, the positives with a bright middle."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split, (positives, negatives) in SPLITS.items():
        labels = random.permutation([1] * positives + [0] * negatives)
        images = random.integers(0, 120, (len(labels), 8, 16, 16), dtype=np.uint8)
        images[labels == 1, :, 5:11, 5:11] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(path, **arrays)
    return path


def tiny_store(folder: Path, *, seed: int = 0) -> Path:
    """A finished store of ``tiny_npz``, in ``folder``."""
    prepare_npz(tiny_npz(folder.with_name(f"{folder.name}.npz"), seed=seed), folder)
    return folder


def overrides(store: Path, out: Path, *more: str) -> list[str]:
    """Settings of a run that takes a second: 3 epochs of 6 steps, with a checkpoint every 4 steps,
    inside the epochs. The last of two values of a setting counts."""
    settings = [
        f"store={store}",
        f"out={out}",
        "clip.size=[16, 16]",
        "plan.batch=8",
        "loader.workers=0",
        "model.name=resnet3d-10",
        "model.width=4",
        "model.stem_pool=false",
        "optim.lr=0.01",
        "train.epochs=3",
        "train.precision=fp32",
        "train.device=cpu",
        "checkpoint.every_steps=4",
        "snapshots.at=[2, 3]",
        *more,
    ]
    return last_of_each(settings)


def tiny_config(store: Path, out: Path, *more: str) -> Config:
    return load_config(None, overrides(store, out, *more))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without what differs between equal runs."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(UNSTEADY)} for line in lines]


def losses_of(run: Path) -> list[float]:
    return [line["train/loss"] for line in metrics_of(run)]


def board_of(run: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a TensorBoard scalar, as TensorBoard shows them."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


class InterruptedSessionError(Exception):
    """Ends a session in the middle."""


def interrupt_at(step: int) -> Progress:
    """``progress`` for ``train``: the session ends after ``step`` steps."""

    def progress(done: int, total: int, metrics: str = "", /) -> None:
        if done == step:
            raise InterruptedSessionError

    return progress


def trained_so(run: Path, *changed: str) -> None:
    """Change the settings of a run, in its settings and in its record."""
    config = load_config(run / "config.yaml", changed)
    dump_config(config, run / "config.yaml")
    _write_record(run, read_record(run) | {"settings": config.model_dump(mode="json")})


def cut(run: Path, to: Path, *, after: int) -> Path:
    """A copy of a run as a kill soon after step ``after`` leaves it."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > after:
            shutil.rmtree(path)
    return to


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    """The environment of a command: one thread, and no launcher's settings of this process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    # A process that crashes prints its Python stack, which a failed test shows.
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    return inherited | fixed | more


def dist_train(*arguments: object) -> list[str]:
    """The command ``dist-train``."""
    return [sys.executable, "-m", "dist_train", *map(str, arguments)]


def launched(file: str, *arguments: object) -> list[str]:
    """The command ``dist-train`` under a file of launch/."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    return [*launcher, str(LAUNCH / file), "-m", "dist_train", *map(str, arguments)]


def ended(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``dist-train``, run in this process: a new
    process would import PyTorch for seconds.

    Exceptions that the command line does not turn into a message are raised.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["dist-train", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main()
    code = caught.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out.getvalue(), err.getvalue()


def said(*arguments: object) -> str:
    """Standard output of ``dist-train`` with these arguments; it must succeed."""
    code, out, err = ended(*arguments)
    assert code == 0, err
    return out


def fails(*arguments: object) -> str:
    """The message, without "error: ", of ``dist-train``, which must fail with that line alone."""
    code, _, err = ended(*arguments)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def refused(*arguments: object) -> str:
    """The message, with "error: ", of ``dist-train``, which must fail; it may warn too."""
    code, _, err = ended(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code != 0
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def run(command: Sequence[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def run_well(command: Sequence[str], **env: str) -> str:
    """Standard output of a command that must succeed."""
    done = run(command, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout
