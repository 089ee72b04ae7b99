"""Numbers of the device that the host reads once they are there, and not once all else is done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def later(number: Tensor) -> Callable[[], float]:
    """What reads a tensor of one element. It waits for what was queued before this call alone: so
    the device has work while the host does what depends on the number."""
    if not number.is_cuda:
        return lambda: float(number)
    # To pinned memory, so that the copy is queued too.
    copy = number.detach().to("cpu", non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def read() -> float:
        there.synchronize()
        return float(copy)

    return read
