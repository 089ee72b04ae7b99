"""Services that show the metrics of runs: MLflow and Weights & Biases, by Accelerate's trackers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from accelerate.tracking import GeneralTracker, MLflowTracker, WandBTracker

from dist_train.errors import ConfigError

#: The packages to install, by tracker.
PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}
#: Experiment of MLflow and project of W&B, if the environment names none.
PROJECT = "dist_train"


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed",
                where="track",
                fix=f"Run 'pip install {PACKAGES[name]}', or leave it out of track.",
            )


def start_tracker(name: str, folder: Path, run_id: str | None) -> tuple[GeneralTracker, str]:
    """Begin a run at a service, or go on with one, and return it with its id there.

    All calls of a tracker must come from the same thread. They raise whatever the service does.

    Args:
        folder: the run's folder, whose name is shown.
        run_id: that of the run to go on with; None for a new one.
    """
    if name == "mlflow":
        # By default a request to a server that is gone is repeated for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        mlflow = MLflowTracker(PROJECT, run_id=run_id, run_name=folder.name)
        mlflow.start()
        return mlflow, str(mlflow.tracker.info.run_id)
    run_id = run_id or secrets.token_hex(4)
    wandb = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        # Else it would replace this process's standard output.
        settings={"console": "off"},
    )
    wandb.start()
    return wandb, run_id
