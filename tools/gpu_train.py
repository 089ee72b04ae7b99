"""Runs by the command line and by torchrun: trained, killed and resumed; one is predicted too."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from demo import checkpoints, metrics, resumed_from, run_until
from gpu_record import ROOT, Record, log_since, log_size

DIST_TRAIN = ["-m", "dist_train"]
#: A launcher that needs no name of this machine.
TORCHRUN = [
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "1", *DIST_TRAIN),
]
#: Positives and negatives of each split.
SPLITS = {"train": (32, 96), "val": (8, 24), "test": (8, 24)}
BATCH = 16
STEPS_PER_EPOCH = sum(SPLITS["train"]) // BATCH


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    """The steps by name. Each needs the steps before it."""
    found: dict[str, Callable[[Record], None]] = {"store": store}
    for name, launcher in (("train", DIST_TRAIN), ("torchrun", TORCHRUN)):
        found |= {
            f"{name}, killed": partial(killed, launcher),
            f"{name}, resumed": partial(resumed, launcher),
        }
        if launcher is DIST_TRAIN:
            found[f"{name}, predicted"] = predicted
    return found


def store(record: Record) -> None:
    from measuring import write_npz

    from dist_train.data.store.build import prepare_npz

    clips = record.scratch / "clips.npz"
    write_npz(clips, SPLITS, (8, 16, 16) if record.tiny else (24, 64, 64))
    prepare_npz(clips, record.scratch / "store")
    record.line(clips=sum(map(sum, SPLITS.values())))


def settings(record: Record) -> list[str]:
    """Settings of a run of some seconds, with loader workers and augmentation on the device."""
    size = [
        "clip.size=[16, 16]", "model.name=resnet3d-10", "model.width=4", "model.stem_pool=false",
        "loader.workers=1", "optim.lr=0.01",
    ] if record.tiny else [
        "clip.size=[64, 64]", "model.name=resnet3d-18", "loader.workers=4",
    ]  # fmt: skip
    epochs = epochs_of(record)
    return [
        f"store={record.scratch / 'store'}",
        f"out={run_of(record)}",
        *size,
        "augment.device=true",
        f"plan.batch={BATCH}",
        f"train.epochs={epochs}",
        f"train.precision={'fp32' if record.device == 'cpu' else 'bf16'}",
        f"train.device={record.device}",
        "checkpoint.every_steps=4",
        f"snapshots.at=[{epochs}]",
    ]


def epochs_of(record: Record) -> int:
    """Enough for some seconds after the first checkpoint, in which the run is killed."""
    return 3 if record.tiny else 5


def run_of(record: Record) -> Path:
    return record.scratch / record.step.partition(",")[0]


def killed(launcher: list[str], record: Record) -> None:
    """Kill all processes of a run by SIGKILL once its first checkpoint exists."""
    if not (record.scratch / "store").exists():
        record.skip("there is no store")
        return
    before, out = log_size(record), run_of(record)
    command = [sys.executable, *launcher, "train", *settings(record)]
    code = run_until(command, lambda: bool(checkpoints(out)))
    if code is not None:
        text = log_since(record, before)
        raise RuntimeError(f"{text}\ntraining ended with code {code} before it was killed")
    record.line(after_step=len(metrics(out)))


def resumed(launcher: list[str], record: Record) -> None:
    """Train the rest of the run: its losses are finite and become lower."""
    out = run_of(record)
    if not checkpoints(out):
        record.skip("there is no checkpoint")
        return
    text = call(record, [*launcher, "train", *settings(record), "--resume", "auto"])
    rows, first_step = metrics(out), resumed_from(out)
    losses = [row["train/loss"] for row in rows]
    nccl = re.search(r"NCCL version (\S+)", text)
    first, last = (
        statistics.mean(part) for part in (losses[:STEPS_PER_EPOCH], losses[-STEPS_PER_EPOCH:])
    )
    rates = [row["speed/clips_per_second"] / BATCH for row in rows]
    record.line(
        resumed_from_step=first_step,
        steps=len(rows),
        steps_per_second=statistics.median(rates[len(rates) // 2 :]),
        loss_of_first_epoch=first,
        loss_of_last_epoch=last,
        val_mcc=rows[-1].get("val/mcc@0.5"),
        device_mb=rows[-1].get("memory/device_mb"),
        nccl=nccl and nccl[1],
    )
    if first_step is None:
        raise RuntimeError("the run started again instead of resuming from its checkpoint")
    if [row["step"] for row in rows] != list(range(1, STEPS_PER_EPOCH * epochs_of(record) + 1)):
        raise RuntimeError("the metrics do not have every step once")
    if not (all(map(math.isfinite, losses)) and last < first):
        raise ArithmeticError(f"the loss went from {first} to {last}")
    if record.device == "cpu" and launcher is TORCHRUN:
        record.skip("NCCL needs CUDA: the processes used gloo", "torchrun, NCCL")


def predicted(record: Record) -> None:
    """Predict held-out clips with the run's snapshot."""
    import pandas as pd

    from dist_train.metrics import binary_metrics

    run = run_of(record)
    if not (run / "snapshots").exists():
        record.skip("the run did not end")
        return
    call(record, [*DIST_TRAIN, "predict", str(run)])
    test = pd.read_csv(run / "predictions.csv").query("split == 'test'")
    record.line(clips=len(test), auc=binary_metrics(test["probability"], test["label"])["auc"])


def call(record: Record, arguments: list[str]) -> str:
    """Run a Python command; its output goes to the log, and is returned.

    Raises:
        RuntimeError: it failed; the message begins with its output.
    """
    before = log_size(record)
    environment = {**os.environ, "NCCL_DEBUG": "VERSION"}
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    text = log_since(record, before)
    if code:
        raise RuntimeError(f"{text}\n{' '.join(arguments[:4])} ended with code {code}")
    return text
