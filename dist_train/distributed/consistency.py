"""Checks that all ranks are in the same state.

A difference is a bug, a faulty GPU or a faulty network, and is reported before it spoils a run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from dist_train.distributed.backends.base import Backend
from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import BackendError


def check_agreement(group: ProcessGroup, values: Mapping[str, object]) -> None:
    """Raise if a value is not the same on all ranks; a collective call.

    Args:
        values: by a name for messages.

    Raises:
        BackendError: naming the value and the ranks in the minority.
    """
    own = {name: str(value) for name, value in values.items()}
    gathered = group.gather(own)
    for name in own:
        found = [of_rank.get(name) for of_rank in gathered]
        (common, _), *others = Counter(found).most_common()
        if others:
            odd = [rank for rank, value in enumerate(found) if value != common]
            raise BackendError(
                f"{name} differs between processes: {found[odd[0]]} on process "
                f"{', '.join(map(str, odd))}, {common} on the others",
                fix="Check that all run the same code on the same store, and their devices.",
            )


def check_weights(backend: Backend) -> None:
    """Raise if a replicated weight differs by any bit between ranks; a collective call.

    Raises:
        BackendError: naming the first such weight and the ranks in the minority.
    """
    if backend.world == 1:
        return
    digests = {f"the weight {name}": _digest(weight) for name, weight in backend.replicated()}
    all_weights = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    # Each weight's digest is sent only if they differ: hundreds, perhaps from hundreds of ranks.
    if len(set(backend.gather(all_weights))) > 1:
        check_agreement(backend, digests)


def _digest(tensor: torch.Tensor) -> str:
    bits = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32)).tobytes()
    return hashlib.sha256(bits).hexdigest()[:16]
