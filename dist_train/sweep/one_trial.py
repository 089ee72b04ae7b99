"""A single trial, in a process of its own: train, predict and evaluate, where it is not done."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import cast

from dist_train.evaluation.baseline import Kind, baseline
from dist_train.evaluation.evaluate import evaluate_run
from dist_train.evaluation.flips import Tta
from dist_train.evaluation.predict import predict
from dist_train.progress import Progress
from dist_train.sweep.folder import read_trial
from dist_train.training.reporting import Say
from dist_train.training.train import train


def run_trial(folder: Path, *, progress: Progress | None = None, say: Say | None = None) -> None:
    """Do what ``trial.json`` says, or go on with it. ``evaluation.json`` is written last.

    Raises:
        DistTrainError: as ``train``, ``predict``, ``evaluate_run`` and ``baseline``.
    """
    trial = read_trial(folder)
    config = trial.config.model_copy(update={"out": folder})
    if trial.kind != "train":
        baseline(config, model=cast("Kind", trial.kind))
        return
    run = folder
    if trial.run is None:
        train(config, resume="auto", progress=progress, say=say)
    else:
        run = folder / trial.run
    predict(run, out=folder, tta=cast("Tta", trial.tta), progress=progress)
    evaluate_run(folder)


def end_with_input() -> None:
    """End this process at once when its standard input is closed, as when its parent is killed."""

    def wait() -> None:
        # Not by sys.stdin, whose lock this thread would hold when the interpreter ends.
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
