"""How good the weights are while they are trained: figures for the log, and snapshots to predict
by. All calls are collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.special import expit
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.batches import Batches
from dist_train.config import Config
from dist_train.data.collate import Batch
from dist_train.engine.backends.base import Backend
from dist_train.engine.ema import Ema
from dist_train.engine.metrics import binary_metrics
from dist_train.engine.together import on_main
from dist_train.infer import held_out_logits
from dist_train.models.norm_gap import by_running_and_own_statistics
from dist_train.models.precise_norm import precise_statistics
from dist_train.outputs import EpochOutputs, joined
from dist_train.run import RunData, as_input
from dist_train.run_folder import SNAPSHOTS
from dist_train.snapshots import save_snapshot, snapshot_facts

Values = dict[str, float | None]


class Judge:
    """Judges the average of the weights, where ``optim.ema`` asks for one, and else the weights.

    Args:
        beat: called after each batch, which no step is waited for in.
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

    def of_training(self, outputs: EpochOutputs) -> Values:
        """Of an epoch that ends: its batches as they were trained on."""
        logits, labels = outputs.gathered()
        return {f"train/{k}": v for k, v in binary_metrics(expit(logits), labels).items()}

    def of_held_out(self, batches: Iterable[Batch]) -> Values:
        """Of the val split, at its own natural class ratio.

        Args:
            batches: this rank's share of it.
        """
        backend = self._backend
        backend.sync_buffers()
        with self._ema.in_place(), backend.autocast():
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
        loss = binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels))
        metrics = binary_metrics(expit(logits), labels)
        return {"val/loss": float(loss)} | {f"val/{k}": v for k, v in metrics.items()}

    def norm_gap(self, batch: Batch, step: int) -> Values:
        """The loss in eval mode, less that by batch statistics, of a micro-batch of each rank of a
        step, on the device: by the trained weights on the same clips, without dropout."""
        volumes = as_input(batch.volumes, self._batches.config_at(step))
        with self._backend.autocast():
            both = by_running_and_own_statistics(self._backend.module, volumes, batch.frames)
        running, own = self._backend.sums(
            [float(binary_cross_entropy_with_logits(y.float(), batch.labels)) for y in both]
        )
        return {"norm/gap": (running - own) / self._backend.world}

    def save_snapshot(self, done: int) -> None:
        """The weights after ``done`` steps, for prediction."""
        with self._ema.in_place(), self._precise_statistics(done):
            weights = self._backend.state(
                lambda name: self._backend.is_main and name.startswith("model/")
            )
            # Copies: what they are of is put back at the end.
            copies = {
                name.removeprefix("model/"): tensor.cpu().clone(
                    memory_format=torch.contiguous_format
                )
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
        config = self._batches.config_at(done - 1)
        running = {name: buffer.clone() for name, buffer in module.named_buffers()}
        batches = self._batches.of_steps(max(0, done - steps), done)
        with torch.no_grad(), self._backend.autocast():
            with precise_statistics(module, self._backend.all_reduce):
                for batch in batches:
                    moved = batch.to(self._backend.device)
                    module(as_input(moved.volumes, config), moved.frames)
                    self._beat()
            yield
            for name, buffer in module.named_buffers():
                buffer.copy_(running[name])
