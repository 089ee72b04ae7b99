"""The tensors of a checkpoint on every rank, where each file is read by one rank alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dist_train.distributed.collectives import Group


class Broadcasting(Group, Protocol):
    """What it needs of the process group."""

    device: torch.device

    def broadcast(self, tensor: Tensor, source: int) -> None: ...


class SharedTensors(Mapping[str, Tensor]):
    """Broadcasts a tensor, from the rank that has it, when it is looked up.

    Making one and looking a tensor up are collective calls: all ranks look up the same names in
    the same order. No rank holds more than the tensors it has and those it keeps.

    Args:
        own: the tensors that this rank has, on the host; each name on one rank.
    """

    def __init__(self, group: Broadcasting, own: Mapping[str, Tensor]) -> None:
        self._group, self._own = group, own
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        self._where = {
            name: (rank, *form)
            for rank, of_rank in enumerate(group.gather(forms))
            for name, form in of_rank.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        if self._group.world == 1:
            return self._own[name]
        source, shape, dtype = self._where[name]
        if source == self._group.rank:
            tensor = self._own[name].to(self._group.device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self._group.device)
        self._group.broadcast(tensor, source)
        return tensor

    def __contains__(self, name: object) -> bool:
        """No collective call."""
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
