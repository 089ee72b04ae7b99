"""Checks that all ranks are in the same state: what differs is a bug, a bad card or a bad network,
and is told before it spoils a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from dist_train.distributed.backends.base import Backend
from dist_train.errors import BackendError


def check_agreement(backend: Backend, facts: Mapping[str, object]) -> None:
    """Raise if a fact is not the same on all ranks; a collective call.

    Raises:
        BackendError: naming the fact and the ranks that are in the minority.
    """
    mine = {name: str(value) for name, value in facts.items()}
    everyone = backend.gather(mine)
    for name in mine:
        values = [of_rank.get(name) for of_rank in everyone]
        (common, _), *others = Counter(values).most_common()
        if others:
            odd = [rank for rank, value in enumerate(values) if value != common]
            raise BackendError(
                f"{name} differs between processes: {values[odd[0]]} on process "
                f"{', '.join(map(str, odd))}, {common} on the others",
                fix="Check that all run the same code on the same store, and their devices.",
            )


def check_weights(backend: Backend) -> None:
    """Raise if a weight that every rank has whole is not the same, bit for bit, on all of them; a
    collective call.

    Raises:
        BackendError: naming the first such weight and the ranks that are in the minority.
    """
    if backend.world == 1:
        return
    digests = {name: _digest(tensor) for name, tensor in backend.replicated()}
    whole = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    # Of each weight only where they differ: there are hundreds, and there may be hundreds of ranks.
    if len(set(backend.gather(whole))) > 1:
        check_agreement(backend, {f"the weight {name}": of for name, of in digests.items()})


def _digest(tensor: torch.Tensor) -> str:
    bits = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32)).tobytes()
    return hashlib.sha256(bits).hexdigest()[:16]
