"""One optimizer step: forward and backward passes of its micro-batches, then the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.data.loading.collate import Batch
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.consistency import check_agreement, check_weights
from dist_train.distributed.foreach import by_dtype
from dist_train.distributed.out_of_memory import is_out_of_memory
from dist_train.distributed.straggler import StragglerDetector
from dist_train.errors import RunError
from dist_train.system.advice import first_line
from dist_train.training.cuda_graphs import make_forward_backward
from dist_train.training.epoch_predictions import EpochPredictions
from dist_train.training.inputs import MakeInputs
from dist_train.training.losses import Loss
from dist_train.training.micro_batch import MicroBatches
from dist_train.training.noise_scale import NoiseScale, squared_norm
from dist_train.training.schedule import Schedule

#: Metrics by name; None where a metric is not known.
Values = dict[str, float | None]


class ShortMemoryError(Exception):
    """Memory did not suffice for a micro-batch; weights and moments are as before the step."""


class BadStepError(Exception):
    """The loss or the gradient norm of a step is not finite, on all ranks."""

    def __init__(self, step: int, loss: float, norm: float, ranks: list[int]) -> None:
        where = f", by process {', '.join(map(str, ranks))}" if ranks else ""
        super().__init__(
            f"at step {step + 1} the loss is {loss:g}{where} and the gradient norm {norm:g}"
        )
        self.step = step


class OptimizerStep:
    """Takes the steps of a run.

    Args:
        config_at: gives the settings of a step, as ``clip`` may grow.
        predictions: collects the logits and classes of each step.
        loss: the training loss.
        inputs: makes what it is computed of.
        noise_scale: estimates the gradient noise scale; None for no estimate.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        plan: Plan,
        schedule: Schedule,
        micro: MicroBatches,
        config_at: Callable[[int], Config],
        predictions: EpochPredictions,
        loss: Loss,
        inputs: MakeInputs,
        noise_scale: NoiseScale | None = None,
    ) -> None:
        self._config, self._backend, self._plan = config, backend, plan
        self._schedule, self._micro, self._config_at = schedule, micro, config_at
        self._predictions, self._loss, self._inputs = predictions, loss, inputs
        self._noise_scale = noise_scale
        self.drop_graphs()
        self._buffers = BufferCopy(backend.module)
        self._stragglers = StragglerDetector(backend, config.train.straggler_ratio)

    def drop_graphs(self) -> None:
        """Drop captured CUDA graphs, after the size of micro-batches has changed."""
        self._forward_backward = make_forward_backward(
            self._backend,
            self._loss,
            outputs=self._config.model.outputs,
            device_knows_frames=self._config.norm.fused,
        )

    def take(
        self,
        step: int,
        batches: Iterator[Batch],
        *,
        skip: bool = False,
        check_ranks: bool = False,
    ) -> Values:
        """Train on the global batch of one step. A collective call.

        Args:
            batches: this rank's micro-batches, from the first one of the step.
            skip: read the step's batches, but do not train on them.
            check_ranks: compare the ranks' steps, and their weights after this step.

        Raises:
            ShortMemoryError: memory does not suffice for a micro-batch; the step can be repeated.
            BadStepError: the loss or the gradient norm is not finite; weights may be spoilt.
            RunError: memory does not suffice for the update, or the ranks differ.
        """
        backend, stragglers = self._backend, self._stragglers
        # Dropout is keyed by seed, step and rank, so that no random state has to be saved.
        key = np.random.SeedSequence((self._config.seed, step, backend.rank))
        torch.manual_seed(int(key.generate_state(1)[0]))
        began = time.perf_counter()
        stragglers.begin()
        lr = self._schedule.lr(step)
        backend.set_lr(lr)
        if skip:
            for _ in range(self._micro.accumulate):
                next(batches)
            return {"train/loss": None, "train/lr": lr}
        with self._repeatable(step):
            total, waited, of_first = self._accumulate_gradients(step, batches)
        # Read before the update, so that a single process does not wait for the update's end.
        # Several processes wait anyway, to exchange their losses.
        own_loss = float(total)
        norm = self._update()
        first = [] if of_first is None else [float(of_first)]
        sum_of_losses, *own_work = backend.sums([own_loss, *stragglers.own_seconds(waited), *first])
        noise = {} if of_first is None else self._noise(step, own_work.pop(), norm)
        mean_loss = sum_of_losses / backend.world
        # In fp16 a step whose gradients overflow is skipped, and the loss scale lowered.
        overflow_is_fine = self._config.train.precision == "fp16"
        if not (math.isfinite(mean_loss) and (math.isfinite(norm) or overflow_is_fine)):
            losses = backend.gather(own_loss)
            odd = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            raise BadStepError(step, mean_loss, norm, odd)
        if check_ranks:
            check_agreement(backend, {"the step": step})
            check_weights(backend)
        seconds = time.perf_counter() - began
        return {
            "train/loss": mean_loss,
            "train/lr": lr,
            "train/grad_norm": norm,
            "speed/clips_per_second": self._plan.clips_at(step) / seconds,
            "speed/data_wait": waited / seconds,
            **noise,
            **stragglers.compare(own_work),
            **_memory(backend.device),
        }

    def _accumulate_gradients(
        self, step: int, batches: Iterator[Batch]
    ) -> tuple[Tensor, float, Tensor | None]:
        """Add up the gradients of a step's micro-batches; return the mean loss of this rank's
        clips, the seconds of waiting for the clips, and the squared norm of the first
        micro-batch's share of the gradient, if the noise scale needs it."""
        backend, accumulate = self._backend, self._micro.accumulate
        total, waited = torch.zeros((), device=backend.device), 0.0
        of_first: Tensor | None = None
        config, weight = self._config_at(step), self._plan.weight(step) / accumulate
        for number in range(accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            with backend.accumulating(last=number == accumulate - 1):
                x, labels, extras = self._inputs(batch, config, step)
                logits, loss = self._forward_backward(x, batch.frames, labels, weight, extras)
            if number == 0 and self._noise_scale is not None and accumulate > 1:
                # Of this rank alone, as gradients are exchanged in the last micro-batch.
                of_first = squared_norm(backend.module)
            total += loss / accumulate
            self._predictions.add(logits, batch.labels)
        return total, waited, of_first

    def _noise(self, step: int, sum_of_first: float, norm: float) -> Values:
        """Return the noise scale, from the sum over the ranks of ``of_first`` and the norm of the
        step."""
        assert self._noise_scale is not None
        world, accumulate = self._backend.world, self._micro.accumulate
        clips, weight = self._plan.clips_at(step), self._plan.weight(step)
        micro = clips / (world * accumulate), sum_of_first / world * (accumulate / weight) ** 2
        return {"train/noise_scale": self._noise_scale.update(micro, (clips, (norm / weight) ** 2))}

    def _update(self) -> float:
        """Update the weights and return the norm of the gradients."""
        try:
            return self._backend.update()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "memory does not suffice for the optimizer's step, whatever the micro-batch",
                where=self._config.out,
                fix="Set train.backend: zero2, with train.offload if need be, and go on by "
                "--resume auto.",
            ) from None

    @contextmanager
    def _repeatable(self, step: int) -> Iterator[None]:
        """When memory runs out in the block, undo it if the backend allows that, and raise
        ``ShortMemoryError``."""
        backend, predictions = self._backend, len(self._predictions)
        if backend.can_repeat:
            self._buffers.keep()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if backend.can_repeat:
                backend.drop_gradients()
                self._buffers.put_back()
                self._predictions.cut(predictions)
            raise ShortMemoryError(
                f"out of memory at step {step + 1} ({first_line(error)})"
            ) from None


class BufferCopy:
    """A copy of a model's buffers, to repeat a step from."""

    def __init__(self, module: nn.Module) -> None:
        self._live = by_dtype(module.buffers())
        self._copies = [[buffer.clone() for buffer in same] for same in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers."""
        for copies, live in zip(self._copies, self._live, strict=True):
            torch._foreach_copy_(copies, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the buffers from the copy."""
        for copies, live in zip(self._copies, self._live, strict=True):
            torch._foreach_copy_(live, copies)


def _memory(device: torch.device) -> Values:
    values: Values = {"memory/host_mb": None}
    # It is unknown without /proc.
    with suppress(psutil.Error, OSError):
        values["memory/host_mb"] = psutil.Process().memory_info().rss / 2**20
    if device.type == "cuda":
        values["memory/device_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values
