"""A run by the command line: trained, killed, resumed and predicted; by torchrun too."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from gpu_record import LOG, ROOT, Record

DIST_TRAIN = ["-m", "dist_train"]
#: A launcher that needs no name of this machine.
TORCHRUN = [
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "1", *DIST_TRAIN),
]
#: Positives and negatives of each split.
SPLITS = {"train": (32, 96), "val": (8, 24), "test": (8, 24)}
BATCH = 16
EPOCH = sum(SPLITS["train"]) // BATCH


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    """The steps by name; each needs those before it."""
    found: dict[str, Callable[[Record], None]] = {"store": store}
    for name, launcher in (("train", DIST_TRAIN), ("torchrun", TORCHRUN)):
        found |= {
            f"{name}, killed": partial(killed, launcher),
            f"{name}, resumed": partial(resumed, launcher),
            f"{name}, predicted": predicted,
        }
    return found


def store(record: Record) -> None:
    """Clips of noise, the positives with a bright middle, as a store."""
    import numpy as np

    from dist_train.data.store.build import prepare_npz

    frames, side = (8, 16) if record.tiny else (24, 64)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, (positives, negatives) in SPLITS.items():
        labels = rng.permutation([1] * positives + [0] * negatives)
        images = rng.integers(0, 120, (len(labels), frames, side, side), dtype=np.uint8)
        third = slice(side // 3, -(side // 3))
        images[labels == 1, :, third, third] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(record.scratch / "clips.npz", **arrays)
    prepare_npz(record.scratch / "clips.npz", record.scratch / "store")
    record.line(clips=sum(map(sum, SPLITS.values())))


def settings(record: Record) -> list[str]:
    """Of a run of some seconds, that loads by workers and augments on the device."""
    size = [
        "clip.size=[16, 16]", "model.name=resnet3d-10", "model.width=4", "model.stem_pool=false",
        "loader.workers=1", "optim.lr=0.01",
    ] if record.tiny else [
        "clip.size=[64, 64]", "model.name=resnet3d-18", "loader.workers=4",
    ]  # fmt: skip
    precision = "fp32" if record.device == "cpu" else "bf16"
    epochs = epochs_of(record)
    return [
        f"store={record.scratch / 'store'}",
        f"out={run_of(record)}",
        *size,
        "augment.device=true",
        f"plan.batch={BATCH}",
        f"train.epochs={epochs}",
        f"train.precision={precision}",
        f"train.device={'cpu' if record.device == 'cpu' else 'cuda'}",
        "checkpoint.every_steps=4",
        f"snapshots.at=[{epochs}]",
    ]


def epochs_of(record: Record) -> int:
    """Enough for some seconds after the first checkpoint, in which the run is killed."""
    return 3 if record.tiny else 10


def run_of(record: Record) -> Path:
    return record.scratch / record.step.partition(",")[0]


def killed(launcher: list[str], record: Record) -> None:
    """SIGKILL to all processes of a run, once its first checkpoint is there."""
    from demo import kill_tree

    if not (record.scratch / "store").exists():
        record.skip("there is no store")
        return
    command = [sys.executable, *launcher, "train", *settings(record)]
    before = log_size(record)
    training = subprocess.Popen(command, cwd=ROOT)
    try:
        while training.poll() is None and not checkpoints(run_of(record)):
            with suppress(subprocess.TimeoutExpired):
                training.wait(0.02)
        code = training.poll()
    finally:
        kill_tree(training.pid)
        training.wait()
    if code is not None:
        text = printed(record, before)
        raise RuntimeError(f"{text}\ntraining ended with code {code} before it was killed")
    record.line(after_step=len(metrics(run_of(record))))


def resumed(launcher: list[str], record: Record) -> None:
    """The rest of the run: its losses are finite and become lower."""
    out = run_of(record)
    if not checkpoints(out):
        record.skip("there is no checkpoint")
        return
    text = call(record, [*launcher, "train", *settings(record), "--resume", "auto"])
    rows, sessions = metrics(out), json.loads((out / "run.json").read_text())["sessions"]
    losses = [row["train/loss"] for row in rows]
    nccl = re.search(r"NCCL version (\S+)", text)
    first, last = statistics.mean(losses[:EPOCH]), statistics.mean(losses[-EPOCH:])
    rates = [row["speed/clips_per_second"] / BATCH for row in rows]
    record.line(
        resumed_from_step=sessions[-1]["resumed_from_step"],
        steps=len(rows),
        steps_per_second=statistics.median(rates[len(rates) // 2 :]),
        loss_of_first_epoch=first,
        loss_of_last_epoch=last,
        val_mcc=rows[-1].get("val/mcc@0.5"),
        device_mb=rows[-1].get("memory/device_mb"),
        nccl=nccl and nccl[1],
    )
    if sessions[-1]["resumed_from_step"] is None:
        raise RuntimeError("the run began anew rather than from its checkpoint")
    if [row["step"] for row in rows] != list(range(1, EPOCH * epochs_of(record) + 1)):
        raise RuntimeError("not every step is there once")
    if not (all(map(math.isfinite, losses)) and last < first):
        raise ArithmeticError(f"the loss went from {first} to {last}")
    if record.device == "cpu" and launcher is TORCHRUN:
        record.skip("NCCL needs CUDA: gloo was in its place", "torchrun, NCCL")


def predicted(record: Record) -> None:
    """Held-out clips by the run's snapshot."""
    run = run_of(record)
    if not (run / "snapshots").exists():
        record.skip("the run did not end")
        return
    call(record, [*DIST_TRAIN, "predict", str(run)])
    with (run / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    positives, negatives = (
        [float(row["probability"]) for row in rows if float(row["label"]) == label]
        for label in (1, 0)
    )
    # By its definition, as 'dist-train evaluate' would take a process more.
    right = sum((a > b) + (a == b) / 2 for a in positives for b in negatives)
    record.line(clips=len(rows), auc=right / len(positives) / len(negatives))


def call(record: Record, arguments: list[str]) -> str:
    """What a command of Python printed: into the log, which keeps it if the command is killed.

    Raises:
        RuntimeError: it failed; the message begins with what it printed.
    """
    before = log_size(record)
    environment = {**os.environ, "NCCL_DEBUG": "VERSION"}
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    text = printed(record, before)
    if code:
        raise RuntimeError(f"{text}\n{' '.join(arguments[:4])} ended with code {code}")
    return text


def log_size(record: Record) -> int:
    return (record.out / LOG).stat().st_size


def printed(record: Record, since: int) -> str:
    """The end of what was logged since the log had so many bytes."""
    return (record.out / LOG).read_bytes()[since:].decode("utf-8", errors="replace")[-6000:]


def checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
