"""A sampler's batches, begun by one and gone on with by another."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from torch.utils.data import Sampler

from dist_train.data.sampler import Slot


class HandedOver(Sampler[list[Slot]]):
    """The batches of a sampler, pass by pass. After ``begin``, whoever walks ``taken`` has the
    first ones of a pass, and the next to iterate, in another thread perhaps, has the rest.

    Attributes:
        are_used_up: there was no rest.
    """

    def __init__(self, batches: Sampler[list[Slot]]) -> None:
        self.are_used_up = False
        self._batches = batches
        self._lock = threading.Lock()
        self._left: Iterator[list[Slot]] | None = None

    def begin(self) -> None:
        self._left = iter(self._batches)

    def taken(self) -> Iterator[list[Slot]]:
        """Batches, until another has asked for its first one."""
        while True:
            with self._lock:
                if self._left is None:
                    return
                slots = next(self._left, None)
            if slots is None:
                self.are_used_up = True
                return
            yield slots

    def __iter__(self) -> Iterator[list[Slot]]:
        with self._lock:
            left, self._left = self._left, None
        yield from iter(self._batches) if left is None else left
