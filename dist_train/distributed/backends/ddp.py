"""Data parallel: every rank has all weights and moments, and gradients are averaged."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from dist_train.config import TrainSettings
from dist_train.distributed.backends.base import Backend, MakeOptimizer
from dist_train.distributed.foreach import zero_gradients
from dist_train.errors import BackendError


class DdpBackend(Backend):
    """torch's DistributedDataParallel, set up by Accelerate; the plain model on one process."""

    def __init__(self, settings: TrainSettings, *, clip_norm: float | None) -> None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise BackendError(
                "train.backend asks for DDP, but the launcher for DeepSpeed",
                fix="Choose the backend by train.backend, not by the launch file.",
            )
        super().__init__(settings, clip_norm=clip_norm)
        if settings.graphs and (self.device.type != "cuda" or self.world > 1):
            raise BackendError(
                f"CUDA graphs are for one process on a CUDA device, and there are {self.world} on "
                f"{self.device.type}",
                where="train.graphs",
                fix="Set it to false.",
            )

    @property
    def can_repeat(self) -> bool:
        return self.model is self.module

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.module = model.to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        if last or self.world == 1:
            return nullcontext()
        context: AbstractContextManager[Any] = self.model.no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def drop_gradients(self) -> None:
        # CUDA graphs add to gradients at fixed addresses.
        if self.settings.graphs:
            zero_gradients(self.module)
        else:
            super().drop_gradients()
