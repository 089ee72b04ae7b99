"""Fully sharded data parallel (torch's FSDP2): weights, gradients and moments are sharded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_train.distributed.backends.base import Backend, MakeOptimizer
from dist_train.errors import BackendError


class FsdpBackend(Backend):
    """``fully_shard`` for each residual block, and for the rest of the model.

    Uses the process group that Accelerate made, but not Accelerate's FSDP plugin, which would wrap
    by class names and cast full models.
    """

    sharding = "FSDP"

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

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)
        return self.autocast()

    def backward(self, loss: Tensor) -> None:
        # Outside of autocast, in which the forward pass ran.
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        return super().local_tensors()

    def gather_full(self, name: str, shard: Tensor) -> Tensor:
        like = self._weight(name)
        if like is None:
            return shard
        sharded = DTensor.from_local(
            shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return sharded.full_tensor()

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        like = self._weight(name)
        return full if like is None else self._sharded(full, like).to_local()

    def _local(self, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.to_local().detach()

    def _weight(self, name: str) -> DTensor | None:
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

    def _gathered(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.full_tensor()

    def _sharded(self, full: Tensor, like: Tensor) -> DTensor:
        assert isinstance(like, DTensor)
        return distribute_tensor(
            full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
