"""Early stopping: a run ends when a metric of held-out clips no longer improves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from dist_train.checkpoint.format import by_step, load_checkpoint, read_marker
from dist_train.checkpoint.retention import best_step
from dist_train.checkpoint.superseded import set_aside
from dist_train.class_metrics import higher_is_better
from dist_train.config import Config, StopSettings
from dist_train.errors import CheckpointError
from dist_train.run.folder import CHECKPOINTS, SNAPSHOT, SNAPSHOTS
from dist_train.run.snapshots import save_snapshot, snapshot_metadata
from dist_train.training.run_state import evaluated_weights

log = logging.getLogger(__name__)


class EarlyStop:
    """Counts epochs without an improvement; part of the checkpointed state.

    Attributes:
        waited: epochs since the best one.
        best: best value so far, and the steps done at it; None before the first.
    """

    def __init__(self, settings: StopSettings) -> None:
        self._settings = settings
        self.waited = 0
        self.best: tuple[float, int] | None = None

    @property
    def is_due(self) -> bool:
        """Whether the run is to end, or has ended, after the last epoch that was counted."""
        return self._settings.metric is not None and self.waited >= self._settings.patience

    def after_epoch(self, done: int, value: float | None) -> bool:
        """Count an epoch that ends after ``done`` steps, and return ``is_due``. A value that is
        None or not finite is no improvement."""
        metric = self._settings.metric
        if metric is None:
            return False
        self.waited += 1
        if value is not None and math.isfinite(value):
            sign = 1.0 if higher_is_better(metric) else -1.0
            least = self._settings.min_delta
            if self.best is None or sign * (value - self.best[0]) > least:
                self.best, self.waited = (value, done), 0
        return self.is_due

    def state(self) -> dict[str, Any] | None:
        """JSON types; None without early stopping."""
        if self._settings.metric is None:
            return None
        return {"metric": self._settings.metric, "best": self.best, "waited": self.waited}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore ``state``; counting begins anew without one, or after one of another metric."""
        self.best, self.waited = None, 0
        if state is not None and state["metric"] == self._settings.metric:
            self.waited = int(state["waited"])
            if state["best"] is not None:
                value, step = state["best"]
                self.best = float(value), int(step)

    def told(self, done: int) -> str:
        """Return why the run has ended after ``done`` steps, in words."""
        settings = self._settings
        best = ""
        if self.best is not None:
            best = f", since it was {self.best[0]:.4g} after step {self.best[1]:,}"
        more = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
        return (
            f"stopped early, after step {done:,}: {settings.metric} has not improved{more} for "
            f"{self.waited:,} epochs{best}. The run is finished; a larger stop.patience goes on"
        )


def keep_best(config: Config, done: int, value: float | None, content: str) -> bool:
    """Save the weights of the best checkpoint as a snapshot, unless those after ``done`` steps,
    whose metric is ``value``, are as good; return whether they are.

    A checkpoint that is damaged is told of in the log. If it was the best one, it is moved to
    ``superseded/``, and the next best one is taken.

    Args:
        content: as for ``snapshot_metadata``.

    Raises:
        OSError: the snapshot cannot be written.
    """
    metric = config.stop.metric
    assert metric is not None
    saved: dict[int, dict[str, float | None]] = {done: {metric: value}}
    folders = {step: path for step, path in by_step(config.out / CHECKPOINTS) if step < done}
    for step, path in folders.items():
        try:
            saved[step] = read_marker(path)["facts"]["metrics"]
        except KeyError:
            continue
        except CheckpointError as error:
            # The writer may just be removing it.
            if path.exists():
                log.warning("a checkpoint is damaged, and cannot be the best: %s", error)
    while True:
        best = best_step(saved, metric)
        if best is None or best == done:
            return True
        try:
            tensors, _ = load_checkpoint(folders[best])
            break
        except CheckpointError as error:
            del saved[best]
            # Left there, it would still be kept as the best, and a whole one removed.
            try:
                where = f"is now {set_aside(config.out, folders[best])}"
            except OSError as failure:
                where = f"cannot be set aside ({failure})"
            log.warning("the best checkpoint is damaged, and %s: %s", where, error)
    names = [n.removeprefix("model/") for n in tensors if n.startswith("model/")]
    weights = evaluated_weights(tensors, names)
    path = config.out / SNAPSHOTS / f"step-{best}{SNAPSHOT}"
    save_snapshot(path, weights, snapshot_metadata(config, best, content))
    return False
