"""Batches on the device that trains, each copied while the step before it runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dist_train.data.loading.collate import Batch
from dist_train.errors import DistTrainError


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches in their order, on ``device``.

    On CUDA one batch is copied ahead, from pinned memory and in a stream of its own: in the stream
    of the step, the copy would wait for the step.

    Raises:
        DistTrainError: as ``batches`` does, after the batches before the error.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied() -> Batch | DistTrainError | None:
        try:
            batch = next(batches, None)
        except DistTrainError as error:
            return error
        if batch is None:
            return None
        with torch.cuda.stream(copies):
            return batch.to(device)

    coming = copied()
    while coming is not None:
        if isinstance(coming, DistTrainError):
            raise coming
        step = torch.cuda.current_stream(device)
        step.wait_stream(copies)
        # Its memory must not be used again before the step is done with it.
        for tensor in (*coming.pixels, coming.labels):
            tensor.record_stream(step)
        current, coming = coming, copied()
        yield current
