"""Read each file of a checkpoint on one rank only, and broadcast its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dist_train.distributed.process_group import ProcessGroup


class SharedTensors(Mapping[str, Tensor]):
    """A mapping that broadcasts a tensor from its owner when it is looked up.

    Construction and lookup are collective calls: all ranks must look up the same names in the same
    order. A rank holds the tensors that it owns, and those that its caller keeps.

    Args:
        own: tensors of this rank, on the host. Each name is owned by one rank.
    """

    def __init__(self, group: ProcessGroup, own: Mapping[str, Tensor]) -> None:
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
        """Whether some rank has it. No collective call, unlike ``Mapping.__contains__``."""
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
