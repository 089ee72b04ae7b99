"""Fully sharded data parallel (torch's FSDP2): weights, gradients and moments are sharded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_train.config import TrainSettings
from dist_train.distributed.backends.base import MOMENTS, Backend, MakeOptimizer, updates_done
from dist_train.errors import BackendError


class FsdpBackend(Backend):
    """``fully_shard`` for each residual block, and for what is left around them.

    Set up on the process group that Accelerate made: what its own plugin adds, wrapping by class
    names and casts of full models, is not wanted here.
    """

    def __init__(self, settings: TrainSettings, *, clip_norm: float | None) -> None:
        super().__init__(settings, clip_norm=clip_norm)
        if not torch.distributed.is_initialized():
            raise BackendError(
                "FSDP needs a launcher, also for one process",
                where="train.backend",
                fix="Start with 'accelerate launch' and a file of launch/.",
            )
        if settings.precision == "fp16":
            raise BackendError(
                "fp16 is not offered under FSDP", where="train.precision", fix="Use bf16 or fp32."
            )

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        # The logits are a view, and nobody writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.world,))
        # A shard is a range of a parameter's first axis, which is contiguous in plain layout only.
        model = model.to(self.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.module = self.model = model
        self.optimizer = make_optimizer(model)
        if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise BackendError("asked for FSDP, but parameters are not sharded")

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)
        return self.autocast()

    def backward(self, loss: Tensor) -> None:
        # Outside of autocast, in which the forward pass ran.
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def update(self) -> float:
        """A norm that is not finite leaves the weights as they are."""
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if value < float("inf"):
            self.optimizer.step()
        self.drop_gradients()
        return value

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        return super().local_tensors()

    def gather_full(self, name: str, shard: Tensor) -> Tensor:
        like = self._sharded(name)
        if like is None:
            return shard
        sharded = DTensor.from_local(
            shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return sharded.full_tensor()

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        like = self._sharded(name)
        return full if like is None else _shard(full, like).to_local()

    def _local(self, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.to_local().detach()

    def _sharded(self, name: str) -> DTensor | None:
        """The weight of that name; None for a statistic, which is replicated."""
        owner, _, last = name.rpartition(".")
        found = getattr(self.module.get_submodule(owner), last)
        return found if isinstance(found, DTensor) else None

    def _reshard(self) -> None:
        # After held-out clips, which have no backward pass, weights are still gathered.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        return super()._full_tensors()

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.full_tensor()

    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        held = self.optimizer.state.get(parameter, {}).get(moment)
        return torch.zeros(parameter.shape) if held is None else held.full_tensor()

    def _load(self, state: Mapping[str, Tensor], updates: int) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(_shard(state[f"model/{name}"], parameter))
        for name, parameter in self.trained():
            self.optimizer.state[parameter] = {
                "step": updates_done(self.optimizer, updates, parameter),
                # A copy, as a view would keep the memory of the full tensor.
                **{
                    m: torch.empty_like(parameter).copy_(_shard(state[f"{m}/{name}"], parameter))
                    for m in MOMENTS
                },
            }


def _shard(full: Tensor, like: Tensor) -> DTensor:
    """This rank's shard of a full tensor that every rank has; it may be a view."""
    assert isinstance(like, DTensor)
    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
