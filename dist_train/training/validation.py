"""How good the weights are while they are trained: figures for the log, and snapshots to predict
by. All calls are collective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from dist_train.config import Config
from dist_train.data.loading.collate import Batch
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.metrics import binary_metrics
from dist_train.models.norm_statistics import by_running_and_own_statistics
from dist_train.run.data import RunData
from dist_train.run.folder import SNAPSHOTS
from dist_train.run.model import as_input, held_out_logits
from dist_train.run.snapshots import save_snapshot, snapshot_facts
from dist_train.training.batches import Batches
from dist_train.training.ema import Ema
from dist_train.training.fresh_statistics import take_statistics
from dist_train.training.losses import make_loss

log = logging.getLogger(__name__)

Values = dict[str, float | None]
#: In the loss; above it held-out figures say more of the statistics than of the weights.
LARGEST_GAP = 0.3


class Validator:
    """Judges the average of the weights, where ``optim.ema`` asks for one, and else the weights.

    Args:
        beat: called after each batch, which no step is waited for in.

    Attributes:
        statistics: BatchNorm statistics by buffer name, as copies, that the weights of the last
            ``judged_weights`` had; empty where those are the running ones.
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
        self.statistics: dict[str, Tensor] = {}
        self._told = False
        self._loss = make_loss(config.loss)

    @contextmanager
    def judged_weights(self, done: int) -> Iterator[None]:
        """Within it, the module has the weights that are judged and saved after ``done`` steps,
        with statistics that belong to them. Afterwards it is as before, to the bit."""
        self._backend.sync_buffers()
        with self._ema.in_place(), self._precise_statistics(done):
            yield

    def of_training(self, outputs: EpochPredictions) -> Values:
        """Of an epoch that ends: its batches as they were trained on."""
        logits, labels = outputs.gathered()
        return {f"train/{k}": v for k, v in binary_metrics(expit(logits), labels).items()}

    def of_held_out(self, batches: Iterable[Batch]) -> tuple[Values, np.ndarray, np.ndarray]:
        """Of the val split, at its own natural class ratio, by ``judged_weights``.

        Args:
            batches: this rank's share of it.

        Returns:
            Metrics, and the labels and probabilities that they are of, float32 [N]; nothing where
            no clip is held out.
        """
        backend = self._backend
        if not len(self._data.numbers("val")):
            return {}, np.empty(0, np.float32), np.empty(0, np.float32)
        with backend.autocast():
            mine = held_out_logits(
                backend.module,
                batches,
                self._config,
                backend.device,
                done=lambda _: self._beat(),
            )
        clips, logits = joined(backend, mine)
        # In an order that does not depend on the number of ranks, and each once.
        clips, places = np.unique(clips, return_index=True)
        logits = logits[places]
        labels = self._data.store.table["label"].to_numpy(np.float32)[clips]
        loss = self._loss(torch.from_numpy(logits), torch.from_numpy(labels))
        scores = expit(logits)
        metrics = {f"val/{k}": v for k, v in binary_metrics(scores, labels).items()}
        return {"val/loss": float(loss)} | metrics, labels, scores

    def norm_gap(self, batch: Batch, step: int) -> Values:
        """The loss in eval mode, less that by batch statistics, of a micro-batch of each rank of a
        step, on the device: by ``judged_weights`` on the same clips, without dropout."""
        volumes = as_input(batch.volumes, self._batches.config_at(step))
        with self._backend.autocast():
            both = by_running_and_own_statistics(self._backend.module, volumes, batch.frames)
        running, own = self._backend.sums(
            [float(self._loss(y.float().cpu(), batch.labels.cpu())) for y in both]
        )
        gap = (running - own) / self._backend.world
        if gap > LARGEST_GAP and not self._told and self._backend.is_main:
            self._told = True
            log.warning(
                "norm/gap is %.2f at step %d: by the statistics that held-out clips are judged by, "
                "the loss of training clips is so much higher than by those of their own batch, so "
                "held-out figures are not of the weights alone: %s",
                gap, step + 1,
                "raise norm.precise_steps or plan.batch" if self._config.norm.precise_steps
                else "set norm.precise_steps, such as 4",
            )  # fmt: skip
        return {"norm/gap": gap}

    def save_snapshot(self, done: int) -> None:
        """``judged_weights`` after ``done`` steps, for prediction."""
        weights = self._backend.state(
            lambda name: self._backend.is_main and name.startswith("model/")
        )
        # Copies: what they are of changes in the next step.
        copies = {
            name.removeprefix("model/"): tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
        }
        path = self._config.out / SNAPSHOTS / f"step-{done}.safetensors"
        facts = snapshot_facts(self._config, done, self._data.store.content)
        on_main(self._backend, lambda: save_snapshot(path, copies, facts))

    @contextmanager
    def _precise_statistics(self, done: int) -> Iterator[None]:
        """Within it, statistics are those of the last steps' batches by the weights as they are."""
        steps, module = self._config.norm.precise_steps, self._backend.module
        if not steps:
            yield
            return
        config, device = self._batches.config_at(done - 1), self._backend.device
        running = {name: buffer.clone() for name, buffer in module.named_buffers()}
        take_statistics(
            module,
            self._batches.last_steps(done, steps),
            config,
            device,
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


# Logits and labels of an epoch's training batches, which its metrics need at its end.


class EpochPredictions:
    """Of this rank's clips, in the order of the steps; kept on the device, as a copy to the host
    would wait for it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Number of batches added, for ``cut``."""
        return len(self._kept)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Of a batch, [B] each; labels may be changed afterwards."""
        # Labels are copied, or they would hold the loader's memory for an epoch.
        self._kept.append((logits.detach().float(), labels.clone()))

    def cut(self, length: int) -> None:
        """Forget what was added beyond the first ``length`` batches."""
        del self._kept[length:]

    def begin(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Begin with those of an epoch that is gone on with, float32 [N] on one rank."""
        device = self._backend.device
        self._kept = [(torch.from_numpy(logits).to(device), torch.from_numpy(labels).to(device))]

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels of all ranks, float32 [N]. A collective call."""
        outputs = self._kept or [(torch.empty(0), torch.empty(0))]
        logits, labels = (torch.cat(column).cpu().numpy() for column in zip(*outputs, strict=True))
        return joined(self._backend, (logits, labels))


def joined(backend: Backend, mine: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of each rank, joined in rank order. A collective call."""
    first, second = zip(*backend.gather(mine), strict=True)
    return np.concatenate(first), np.concatenate(second)
