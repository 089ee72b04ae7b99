"""Metrics and snapshots of the weights while they are trained. All calls are collective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dist_train.class_metrics import metrics_of
from dist_train.config import Config
from dist_train.data.loading.collate import Batch
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.models.norm_statistics import by_running_and_own_statistics
from dist_train.run.data import RunData
from dist_train.run.folder import SNAPSHOTS
from dist_train.run.model import as_input, held_out_logits
from dist_train.run.snapshots import save_snapshot, snapshot_metadata
from dist_train.training.batches import Batches
from dist_train.training.ema import Ema
from dist_train.training.epoch_predictions import EpochPredictions, gather_pairs
from dist_train.training.fresh_statistics import take_statistics
from dist_train.training.losses import make_loss
from dist_train.training.step import Values

log = logging.getLogger(__name__)

#: Loss above which the gap of the statistics makes validation metrics useless.
LARGEST_GAP = 0.3


class Validator:
    """Validates the average of the weights if ``optim.ema`` is set, else the weights.

    Args:
        beat: watchdog heartbeat, called after each validation batch.

    Attributes:
        statistics: BatchNorm statistics by buffer name of the last ``evaluated_weights``; empty if
            those were the running ones.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        batches: Batches,
        backend: Backend,
        ema: Ema,
        beat: Callable[[], None],
    ) -> None:
        self._config, self._data, self._batches = config, data, batches
        self._backend, self._ema, self._beat = backend, ema, beat
        self._loss = make_loss(config.loss, target=data.target)
        self._has_warned = False
        self.statistics: dict[str, Tensor] = {}

    @contextmanager
    def evaluated_weights(self, done: int) -> Iterator[None]:
        """In the block, the module has the weights that are validated and saved after ``done``
        steps, and statistics that belong to them. Afterwards it is as before, to the bit."""
        self._backend.sync_buffers()
        with self._ema.in_place(), self._precise_statistics(done):
            yield

    def training_metrics(self, predictions: EpochPredictions) -> Values:
        """Return the metrics of an epoch's training batches, as they were trained on."""
        logits, labels = predictions.gathered()
        return {f"train/{k}": v for k, v in self._metrics(logits, labels)[0].items()}

    def validate(self, batches: Iterable[Batch]) -> tuple[Values, np.ndarray, np.ndarray]:
        """Validate ``evaluated_weights`` on the val split at its natural class ratio.

        Args:
            batches: this rank's share of the split.

        Returns:
            Metrics, labels as the loss takes them, and scores as ``Target.scores`` gives them; all
            empty if no clip is held out.
        """
        if not self._data.count("val"):
            return {}, np.empty(0, np.float32), np.empty(0, np.float32)
        backend = self._backend
        with backend.autocast():
            own = held_out_logits(
                backend.module,
                batches,
                self._config,
                backend.device,
                done=lambda _: self._beat(),
            )
        clips, logits = gather_pairs(backend, own)
        # Each clip once, in an order that does not depend on the number of ranks.
        clips, places = np.unique(clips, return_index=True)
        logits = logits[places]
        labels = self._data.labels_of(clips)
        loss = self._loss(torch.from_numpy(logits), torch.from_numpy(labels))
        metrics, scores = self._metrics(logits, labels)
        values: Values = {"val/loss": float(loss)}
        return values | {f"val/{k}": v for k, v in metrics.items()}, labels, scores

    def _metrics(self, logits: np.ndarray, labels: np.ndarray) -> tuple[Values, np.ndarray]:
        """Return the metrics of the run's kind, and the scores."""
        target = self._data.target
        scores = target.scores(logits)
        return metrics_of(target, scores, target.truth(labels)), scores

    def norm_gap(self, batch: Batch, step: int) -> Values:
        """Return the loss by ``evaluated_weights`` and their statistics, less that by the batch's.

        ``batch`` is a micro-batch of ``step`` on the device; dropout is off.
        """
        volumes = as_input(batch.volumes, self._batches.config_at(step))
        with self._backend.autocast():
            both = by_running_and_own_statistics(self._backend.module, volumes, batch.frames)
        running, own = self._backend.sums(
            [float(self._loss(y.float().cpu(), batch.labels.cpu())) for y in both]
        )
        gap = (running - own) / self._backend.world
        if gap > LARGEST_GAP and not self._has_warned and self._backend.is_main:
            self._has_warned = True
            fix = "raise norm.precise_steps or plan.batch"
            if not self._config.norm.precise_steps:
                fix = "set norm.precise_steps, such as 4"
            log.warning(
                "norm/gap is %.2f at step %d: training clips have so much more loss by the "
                "statistics that validation uses than by those of their own batch, so validation "
                "metrics do not depend on the weights alone: %s",
                gap, step + 1, fix,
            )  # fmt: skip
        return {"norm/gap": gap}

    def save_snapshot(self, done: int) -> None:
        """Save ``evaluated_weights`` after ``done`` steps, for prediction."""
        weights = self._backend.state(
            lambda name: self._backend.is_main and name.startswith("model/")
        )
        # Copies, as the next step changes the weights.
        copies = {
            name.removeprefix("model/"): tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
        }
        path = self._config.out / SNAPSHOTS / f"step-{done}.safetensors"
        metadata = snapshot_metadata(self._config, done, self._data.store.content)
        on_main(self._backend, lambda: save_snapshot(path, copies, metadata))

    @contextmanager
    def _precise_statistics(self, done: int) -> Iterator[None]:
        """In the block, statistics are of the last steps' clips by the present weights."""
        steps, module = self._config.norm.precise_steps, self._backend.module
        if not steps:
            yield
            return
        running = {name: buffer.clone() for name, buffer in module.named_buffers()}
        take_statistics(
            module,
            self._batches.last_steps(done, steps),
            self._batches.config_at(done - 1),
            self._backend.device,
            all_reduce=self._backend.all_reduce,
            beat=self._beat,
        )
        self.statistics = {
            name: buffer.cpu().clone()
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point()
        }
        yield
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(running[name])
