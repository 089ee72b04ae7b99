"""The interface of all backends: one process's view of a training on many.

It has a rank, a device, a model to call, and a training state by parameter name that looks the same
however the tensors are spread over the ranks.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed import DistError

from dist_train.config import TrainSettings
from dist_train.distributed.device import chosen_cuda
from dist_train.distributed.hardware import cudnn_version, cudnn_warnings, lacks_bf16
from dist_train.distributed.peer_loss import first_sentence
from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import BackendError, LostProcessError

log = logging.getLogger(__name__)

#: Key of an optimizer's group: the factor of its learning rate.
LR_SCALE = "lr_scale"

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Backend(ProcessGroup, ABC):
    """The process group, the wrapped model and its optimizer.

    Args:
        settings: precision, backend, and how long to wait for other processes.
        clip_norm: largest global gradient norm, or None.

    Attributes:
        module: the model itself, whose parameter names the state has; called for held-out clips.
        model: the wrapped model, called in training.
        optimizer: as Accelerate or torch made it.
        numels: elements of each full weight and buffer by name, also where they are sharded.
        moments: what the optimizer keeps beside each parameter, by its names.

    Raises:
        BackendError: the machine cannot do what is asked, or another backend than the one asked
            for would run.
    """

    #: Values of ``accelerator.distributed_type`` when this backend really runs.
    runs_as: tuple[str, ...] = ("NO", "MULTI_GPU", "MULTI_CPU")
    #: The name, in messages, of a backend that needs a launcher and offers no fp16.
    sharding: str | None = None
    module: nn.Module
    model: Any
    optimizer: Any
    numels: dict[str, int]
    moments: tuple[str, ...]

    def __init__(self, settings: TrainSettings, *, clip_norm: float | None) -> None:
        self.settings, self.clip_norm = settings, clip_norm
        cuda = chosen_cuda(settings)
        launched = "WORLD_SIZE" in os.environ
        self._check_settings(cuda, launched)
        handlers = [
            InitProcessGroupKwargs(
                backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=settings.timeout)
            ),
            # Running statistics are read only after a call of ``sync_buffers``.
            # Gradients live in the buckets that are exchanged, which saves copies.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ]
        try:
            self.accelerator = self._accelerator(cuda, handlers if launched else [])
        except DistError as error:
            raise _not_connected(error) from error
        super().__init__(
            int(self.accelerator.process_index),
            int(self.accelerator.num_processes),
            self.accelerator.device,
        )
        self._check_running()
        for warning in _warnings(settings, cuda):
            log.log(logging.WARNING if self.is_main else logging.DEBUG, "%s", warning)

    @property
    def can_repeat(self) -> bool:
        """Whether a step whose forward or backward pass failed can be repeated after
        ``drop_gradients``. False where hooks exchange gradients or weights meanwhile."""
        return False

    def _accelerator(self, cuda: bool, handlers: list[Any]) -> Accelerator:
        precision = self.settings.precision
        return Accelerator(
            cpu=not cuda,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=handlers,
        )

    def _check_settings(self, cuda: bool, launched: bool) -> None:
        if self.settings.precision == "fp16" and (self.sharding or not cuda):
            what = (
                f"is not offered under {self.sharding}" if self.sharding else "needs a CUDA device"
            )
            raise BackendError(f"fp16 {what}", where="train.precision", fix="Use bf16 or fp32.")
        if self.sharding is not None and not launched:
            raise BackendError(
                f"{self.sharding} needs a launcher, also for one process",
                where="train.backend",
                fix="Start with 'accelerate launch' and a file of launch/.",
            )

    def _check_running(self) -> None:
        """Refuse processes that did not find each other, as each would train alone, and another
        backend than the one asked for, which Accelerate may choose without a word."""
        promised = int(os.environ.get("WORLD_SIZE", "1"))
        if promised != self.world:
            raise BackendError(
                f"the launcher started {promised} processes, but only {self.world} found each other"
            )
        running = str(self.accelerator.distributed_type.value)
        if running not in self.runs_as:
            raise BackendError(
                f"train.backend is {self.settings.backend}, but {running} is what Accelerate runs",
                fix="Choose the backend by train.backend alone, not by the launcher's settings.",
            )

    # The step.

    def wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Take over the model (on any device, before the first step) and make its optimizer."""
        self.numels = {name: tensor.numel() for name, tensor in model.state_dict().items()}

        def make(wrapped: nn.Module) -> torch.optim.Optimizer:
            optimizer = make_optimizer(wrapped)
            self.moments = moments_of(optimizer)
            return optimizer

        self._wrap(model, make)

    @abstractmethod
    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None: ...

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch; gradients are exchanged in the last one of a step only."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss that is already divided by the number of micro-batches."""

    def update(self) -> float:
        """Clip, step and clear the gradients, after the last micro-batch.

        A norm that is not finite may spoil the weights under ZeRO, and nowhere else.

        Returns:
            The global gradient norm before clipping.
        """
        limit = math.inf if self.clip_norm is None else self.clip_norm
        clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(self._gathered(clipped))
        # fp16's scaler skips a step that is not finite itself, and lowers its scale.
        if self.accelerator.scaler is not None or norm < math.inf:
            self.optimizer.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        """Clear the gradients without a step."""
        self.module.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming step, before its first micro-batch; a group has
        ``LR_SCALE`` times this rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_SCALE, 1.0)

    # Training state by parameter name.

    def sync_buffers(self) -> None:
        """Give every rank rank 0's BatchNorm statistics."""
        self.sync(self.module.buffers())

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter, as this rank has it, of all that is trained."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that must have the same values on all ranks."""
        return self.module.named_parameters()

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and live tensor of each weight's local shard, and of each statistic.

        After writing into them, call ``local_tensors_changed``. Not to be called between the
        micro-batches of a step.
        """
        for name, parameter in self.module.named_parameters():
            yield name, self._local(parameter)
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point():
                yield name, buffer

    def local_tensors_changed(self) -> None:
        """Compute with the values written into ``local_tensors``. A collective call."""

    def gather_full(self, name: str, shard: Tensor) -> Tensor:
        """Gather a full tensor that is sharded like weight ``name``. A collective call."""
        return shard

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of a full tensor, sharded like weight ``name``."""
        return full

    def _local(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def state_names(self) -> list[str]:
        """Names of all tensors of the training state, the same on every rank."""
        weights = [name for name, _ in self.module.named_parameters()]
        buffers = [name for name, _ in self.module.named_buffers()]
        moments = [f"{moment}/{name}" for name, _ in self.trained() for moment in self.moments]
        return [*(f"model/{name}" for name in [*weights, *buffers]), *moments]

    def sizes(self) -> dict[str, int]:
        """Elements of each tensor of ``state_names``."""
        return {name: self.numels[name.partition("/")[2]] for name in self.state_names()}

    def state(self, mine: Callable[[str], bool]) -> dict[str, Tensor]:
        """The full tensors for which ``mine(name)``. A collective call.

        They may be live: copy them before the next step. Sharded tensors are gathered one at a
        time, and freed at once on the ranks that do not keep them.
        """
        self.sync_buffers()
        return {name: full.detach() for name, full in self._full_tensors() if mine(name)}

    def load_state(self, state: Mapping[str, Tensor], *, updates: int) -> None:
        """Load a full training state, after ``wrap``.

        Args:
            state: every tensor of ``state_names``, of any world size and backend, on any device.
                All ranks look the tensors up in the same order.
            updates: optimizer steps taken so far, for the correction of AdamW's and LAMB's bias.
        """
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(state[f"model/{name}"])
            self._load(state, updates)

    def _full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of ``state_names``, one at a time, gathered where they are sharded."""
        for name, parameter in self.module.named_parameters():
            yield f"model/{name}", self._full_weight(parameter)
        for name, buffer in self.module.named_buffers():
            yield f"model/{name}", buffer
        for name, parameter in self.trained():
            for moment in self.moments:
                yield f"{moment}/{name}", self._full_moment(parameter, moment)

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        return self._gathered(parameter)

    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """A moment of a parameter; zeros before the first step."""
        held = self.optimizer.state.get(parameter, {}).get(moment)
        return torch.zeros(parameter.shape) if held is None else self._gathered(held)

    def _load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Put weights and moments in place."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self._sharded(state[f"model/{name}"], parameter))
        for name, parameter in self.trained():
            self.optimizer.state[parameter] = {
                "step": updates_done(self.optimizer, updates, parameter),
                # Copies: a view of a shard would keep the full tensor's memory.
                **{
                    moment: torch.empty_like(parameter).copy_(
                        self._sharded(state[f"{moment}/{name}"], parameter)
                    )
                    for moment in self.moments
                },
            }

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The full tensor of a weight or moment."""
        return tensor

    def _sharded(self, full: Tensor, like: Tensor) -> Tensor:
        """This rank's part of a full tensor, sharded as ``like`` is; it may be a view."""
        return full

    def scaler_state(self) -> dict[str, Any] | None:
        """The state of fp16's loss scale, as JSON types; None without one."""
        scaler = self.accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore ``scaler_state``, if both runs have a loss scale."""
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the run, for calling ``module`` itself (held-out clips)."""
        return autocast(self.settings.precision, self.device)

    def close(self) -> None:
        """Leave the process group. Another backend, also of another precision, can be made in this
        process afterwards."""
        self.accelerator.end_training()
        forget_settings()


def _warnings(settings: TrainSettings, cuda: bool) -> list[str]:
    if cuda:
        # Of the cuDNN that runs: torch's own, or one installed beside it.
        return cudnn_warnings(settings, cudnn_version() or 0)
    if settings.precision == "bf16" and lacks_bf16():
        return [
            "this CPU has no instructions for bf16, in which steps take many times as long as "
            "in float32: set train.precision=fp32"
        ]
    return []


def _not_connected(error: DistError) -> LostProcessError:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = first_sentence(error)
    if "EADDRINUSE" in str(error) or "failed to listen" in str(error):
        reason = "the port is taken, by another run or by a second process that is rank 0 as well"
    return LostProcessError(
        f"the {os.environ.get('WORLD_SIZE')} processes of the launch did not find each other at "
        f"{place} ({reason})",
        fix="See that all are started, each with a rank of its own from 0, and that this address "
        "leads to the machine of rank 0 from all others; 'dist-train doctor' under the launcher "
        "tests that.",
    )


def forget_settings() -> None:
    """Reset Accelerate, which keeps the first precision and device of a process and refuses
    others."""
    AcceleratorState._reset_state(reset_partial_state=True)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """torch.autocast for "bf16" and "fp16", nothing for "fp32"."""
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What SGD, or AdamW or LAMB, keeps beside each parameter."""
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    return ("momentum_buffer",) if is_sgd else ("exp_avg", "exp_avg_sq")


def updates_done(optimizer: torch.optim.Optimizer, updates: int, parameter: Tensor) -> Tensor:
    """AdamW's and LAMB's ``step`` of a parameter, which SGD ignores, float32 []: on the device for
    the fused kernel, which reads it there, else on the host."""
    where = parameter.device if optimizer.defaults.get("fused") else "cpu"
    return torch.tensor(float(updates), device=where)
