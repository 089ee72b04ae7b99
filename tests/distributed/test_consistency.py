"""Checks that all ranks are in the same state; tests/faults/test_agreement.py has real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.distributed.consistency import check_weights
from dist_train.errors import BackendError


class Ranks:
    """Rank 0 of so many; the others have other weights."""

    def __init__(self, world: int) -> None:
        self.world, self.read = world, 0

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        self.read += 1
        yield "a.weight", torch.zeros(3)

    def gather(self, value: Any) -> list[Any]:
        other = {"the weight a.weight": "other"} if isinstance(value, dict) else "other"
        return [value, *[other] * (self.world - 1)]


def test_a_process_alone_does_not_read_its_weights() -> None:
    alone = Ranks(1)
    check_weights(alone)
    assert alone.read == 0


def test_a_weight_that_differs_is_named() -> None:
    with pytest.raises(BackendError, match=r"the weight a\.weight differs between processes"):
        check_weights(Ranks(3))
