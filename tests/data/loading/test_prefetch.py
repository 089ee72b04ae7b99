"""Batches come to the device in their order, and an error where it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dist_train.data.loading.collate import Batch
from dist_train.data.loading.prefetch import on_device
from dist_train.errors import StoreError

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"),
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]
COUNT = 5


def numbered(count: int = COUNT, fails_at: int | None = None) -> Iterator[Batch]:
    for number in range(count):
        if number == fails_at:
            raise StoreError("damaged")
        volumes = torch.full((2, 1, 64, 32, 32), number, dtype=torch.uint8)
        if torch.cuda.is_available():
            volumes = volumes.pin_memory()
        yield Batch(volumes, None, torch.full((2,), float(number)), torch.tensor([number, number]))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_all_come_in_order(device: torch.device) -> None:
    came = []
    for batch in on_device(numbered(), device):
        assert batch.volumes.device.type == batch.labels.device.type == device.type
        assert batch.clips.device.type == "cpu"
        # Work that is queued behind the copy, as a step is.
        mean = batch.volumes.float().mean() * torch.ones(512, 512, device=device)
        came.append((float(mean.max()), float(batch.labels[1]), int(batch.clips[0])))
    assert came == [(number, number, number) for number in range(COUNT)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_an_error_comes_after_the_batches_before_it(device: torch.device) -> None:
    came = []
    with pytest.raises(StoreError, match="damaged"):
        came.extend(int(batch.clips[0]) for batch in on_device(numbered(fails_at=3), device))
    assert came == [0, 1, 2]
