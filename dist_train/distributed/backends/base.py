"""What every backend is to the rest of the package: one process's view of a training on many.

Its rank, its device, a model to call, and a training state by parameter name that looks the same
however the tensors are spread over the ranks.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed import DistError

from dist_train.config import TrainSettings
from dist_train.distributed.collectives import first_sentence
from dist_train.distributed.device import chosen_cuda
from dist_train.distributed.foreach import by_dtype
from dist_train.distributed.hardware import cudnn_version, cudnn_warnings, lacks_bf16
from dist_train.errors import BackendError, LostProcessError

log = logging.getLogger(__name__)

# AdamW keeps these beside each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Backend(ABC):
    """The process group, the wrapped model and its optimizer.

    Args:
        settings: precision, backend, and how long to wait for other processes.
        clip_norm: largest global gradient norm, or None.

    Attributes:
        module: the model itself, by whose names the state goes; to be called for held-out clips.
        model: what is called in training.
        numels: elements of each full weight and buffer by name, also where they are sharded.

    Raises:
        BackendError: the machine cannot do what is asked, or another backend than the one asked
            for would run.
    """

    #: What ``accelerator.distributed_type`` says of it when it really runs.
    runs_as: tuple[str, ...] = ("NO", "MULTI_GPU", "MULTI_CPU")
    module: nn.Module
    model: Any
    numels: dict[str, int]

    def __init__(self, settings: TrainSettings, *, clip_norm: float | None) -> None:
        self.settings, self.clip_norm = settings, clip_norm
        cuda = chosen_cuda(settings)
        if settings.precision == "fp16" and not cuda:
            raise BackendError(
                "fp16 needs a CUDA device", where="train.precision", fix="Use bf16 or fp32."
            )
        launched = "WORLD_SIZE" in os.environ
        handlers = [
            InitProcessGroupKwargs(
                backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=settings.timeout)
            ),
            # Running statistics are read where ``sync_buffers`` was called, and only there.
            # Gradients lie in the buckets that are exchanged, rather than be copied there and back.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ]
        try:
            self.accelerator = self._accelerator(cuda, handlers if launched else [])
        except DistError as error:
            raise _not_met(error) from error
        self.rank = int(self.accelerator.process_index)
        self.world = int(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        self._check_world()
        self._check_active()
        if not cuda and settings.precision == "bf16" and lacks_bf16():
            log.log(
                logging.WARNING if self.is_main else logging.DEBUG,
                "this CPU has no instructions for bf16, in which steps take many times as long as "
                "in float32: set train.precision=fp32",
            )
        if cuda:
            # Of the build's own cuDNN or one installed beside it: the one that runs.
            for warning in cudnn_warnings(settings, cudnn_version() or 0):
                log.log(logging.WARNING if self.is_main else logging.DEBUG, "%s", warning)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def can_repeat(self) -> bool:
        """Whether a step whose forward or backward pass failed can be begun again, after
        ``drop_gradients``. Not where hooks exchange gradients or weights on the way."""
        return False

    def _accelerator(self, cuda: bool, handlers: list[Any]) -> Accelerator:
        return Accelerator(
            cpu=not cuda,
            mixed_precision=_accelerate_name(self.settings.precision),
            kwargs_handlers=handlers,
        )

    def _check_world(self) -> None:
        """Launchers may start processes that do not find each other; each would train alone."""
        promised = int(os.environ.get("WORLD_SIZE", "1"))
        if promised != self.world:
            raise BackendError(
                f"the launcher started {promised} processes, but only {self.world} found each other"
            )

    def _check_active(self) -> None:
        """Accelerate may fall back to another backend in silence."""
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
        self._wrap(model, make_optimizer)

    @abstractmethod
    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None: ...

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch; gradients are exchanged in the last one of a step only."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, which is divided by the number of micro-batches already."""

    @abstractmethod
    def update(self) -> float:
        """Clip, step and clear the gradients, after the last micro-batch.

        Where the norm is not finite, weights may be spoiled.

        Returns:
            The global gradient norm before clipping.
        """

    @abstractmethod
    def drop_gradients(self) -> None:
        """Clear the gradients without a step."""

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming step, to be set before its first micro-batch."""

    # Training state by parameter name.

    def sync_buffers(self) -> None:
        """Give every rank rank 0's BatchNorm statistics."""
        self.sync(self.module.buffers())

    def sync(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank rank 0's values, in place, by one broadcast for each dtype: for many
        small tensors. A collective call."""
        if self.world == 1:
            return
        for same in by_dtype(tensors):
            together = torch.cat([tensor.detach().reshape(-1) for tensor in same])
            torch.distributed.broadcast(together, src=0)
            pieces = torch.split(together, [tensor.numel() for tensor in same])
            with torch.no_grad():
                torch._foreach_copy_(
                    same, [piece.view(t.shape) for piece, t in zip(pieces, same, strict=True)]
                )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter, as this rank has it, of all that is trained."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that are replicated, so that all ranks must have the same values."""
        return self.module.named_parameters()

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and live tensor of each weight's local shard, and of each statistic.

        The caller may write into them, and then calls ``local_tensors_changed``. Not to be called
        between the micro-batches of a step.
        """
        for name, parameter in self.module.named_parameters():
            yield name, self._local(parameter)
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point():
                yield name, buffer

    def local_tensors_changed(self) -> None:  # noqa: B027  # most backends compute with these tensors
        """Compute with the values written into ``local_tensors``. A collective call."""

    def gather_full(self, name: str, shard: Tensor) -> Tensor:
        """The full tensor of which each rank has a shard as of weight ``name``. A collective
        call."""
        return shard

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of a full tensor that is sharded as weight ``name`` is."""
        return full

    def _local(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def state_names(self) -> list[str]:
        """Names of all tensors of the training state, the same on every rank."""
        weights = [name for name, _ in self.module.named_parameters()]
        buffers = [name for name, _ in self.module.named_buffers()]
        moments = [f"{moment}/{name}" for name, _ in self.trained() for moment in MOMENTS]
        return [*(f"model/{name}" for name in [*weights, *buffers]), *moments]

    def sizes(self) -> dict[str, int]:
        """Elements of each tensor of ``state_names``."""
        return {name: self.numels[name.partition("/")[2]] for name in self.state_names()}

    def state(self, mine: Callable[[str], bool]) -> dict[str, Tensor]:
        """The full tensors for which ``mine(name)``. They may be live: copy them before the next
        step. A collective call."""
        self.sync_buffers()
        kept = {}
        for name, tensor in self._full_tensors():
            if mine(name):
                kept[name] = tensor.detach()
        return kept

    def load_state(self, state: Mapping[str, Tensor], *, updates: int) -> None:
        """Load a full training state, after ``wrap``.

        Args:
            state: every tensor of ``state_names``, of any world size and backend, on any device.
                All ranks look the tensors up in the same order.
            updates: optimizer steps taken so far, for AdamW's bias correction.
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
            for moment in MOMENTS:
                yield f"{moment}/{name}", self._full_moment(parameter, moment)

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    @abstractmethod
    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """A moment of a parameter; zeros before the first step."""

    @abstractmethod
    def _load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Put weights and moments in place."""

    def scaler_state(self) -> dict[str, Any] | None:
        """The state of fp16's loss scale, as JSON types; None without one."""
        scaler = self.accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Take up what ``scaler_state`` gave; nothing where either run has no loss scale."""
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the run, for calling ``module`` itself (held-out clips)."""
        return autocast(self.settings.precision, self.device)

    # Talk between ranks.

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each of a few numbers, in float64, on every rank."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give every rank the values of rank ``source``, in place."""
        if self.world > 1:
            torch.distributed.broadcast(tensor, src=source)

    def close(self) -> None:
        """Leave the process group. Another backend can be made in this process afterwards, also of
        another precision."""
        self.accelerator.end_training()
        forget_settings()


def _not_met(error: DistError) -> LostProcessError:
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
    """Let another backend be made in this process: Accelerate keeps the first precision and device
    of a process, and refuses others."""
    AcceleratorState._reset_state(reset_partial_state=True)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """torch.autocast for "bf16" and "fp16", nothing for "fp32"."""
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def _accelerate_name(precision: str) -> str:
    return "no" if precision == "fp32" else precision


def updates_done(optimizer: torch.optim.Optimizer, updates: int, parameter: Tensor) -> Tensor:
    """AdamW's ``step`` of a parameter, float32 []: the fused kernel reads it on the device, and the
    others on the host."""
    where = parameter.device if optimizer.defaults["fused"] else "cpu"
    return torch.tensor(float(updates), device=where)
