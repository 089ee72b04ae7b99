"""Whose work takes long: what is measured, and when it is said."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.distributed import straggler
from dist_train.distributed.straggler import QUIET, WINDOW, StragglerDetector


@dataclass
class Ranks:
    """What it needs of a backend, of which it is rank 0."""

    world: int = 4
    rank: int = 0
    is_main: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    module: nn.Module = field(default_factory=lambda: nn.Sequential(nn.Conv3d(1, 1, 1), nn.ReLU()))

    def gather(self, value: Any) -> list[Any]:
        return [f"host{rank}" for rank in range(self.world)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that all clocks show, in its only place."""
    now = [0.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(straggler.time, name, lambda: now[0])
    return now


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_own_work_is_data_and_convolutions(clock: list[float]) -> None:
    class Takes(nn.Conv3d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            clock[0] += 3
            return super().forward(input)

    class Waits(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            clock[0] += 100
            return input

    ranks = Ranks(rank=2, module=nn.Sequential(Takes(1, 1, 1), Waits(), Takes(1, 1, 1)))
    measured = StragglerDetector(ranks, slow=1.5)
    ranks.module(torch.zeros(1, 1, 2, 2, 2))
    measured.begin()
    ranks.module(torch.zeros(1, 1, 2, 2, 2))
    assert measured.own_seconds(waited=5) == [0, 0, 11, 0]
    ranks.module(torch.zeros(1, 1, 2, 2, 2))
    measured.begin()
    assert measured.own_seconds(waited=1) == [0, 0, 1, 0], "held-out clips do not count"


def test_a_slow_one_is_named_after_a_while_and_not_again_soon(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    measured = StragglerDetector(Ranks(), slow=1.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(WINDOW - 1):
            assert measured.compare([1.0, 1.1, 0.9, 2.0]) == {"speed/slowest_rank_ratio": 2.0}
        assert said(caplog) == []
        for _ in range(5):
            measured.compare([1.0, 1.1, 0.9, 2.0])
        (line,) = said(caplog)
        assert "process 3 on host3 is slow: over the last 20 steps" in line
        assert "2.0 times as long" in line
        clock[0] += QUIET
        measured.compare([1.0, 1.1, 0.9, 2.0])
        assert len(said(caplog)) == 2


def test_one_long_step_is_not_slowness(caplog: pytest.LogCaptureFixture) -> None:
    measured = StragglerDetector(Ranks(), slow=1.5)
    with caplog.at_level(logging.WARNING):
        for step in range(3 * WINDOW):
            measured.compare([1.0, 8.0 if step % WINDOW == 0 else 1.0, 1.0, 1.0])
    assert said(caplog) == []


def test_a_process_alone_is_compared_with_nobody() -> None:
    measured = StragglerDetector(Ranks(world=1), slow=1.5)
    assert measured.own_seconds(waited=5) == []
    assert measured.compare([]) == {}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_the_devices_own_time_counts() -> None:
    """Convolutions are handed over in far less time than they take."""
    device = torch.device("cuda")
    ranks = Ranks(device=device, module=nn.Conv3d(16, 16, 5, padding=2).to(device))
    measured = StragglerDetector(ranks, slow=1.5)
    clip = torch.zeros(1, 16, 32, 64, 64, device=device)
    ranks.module(clip)
    times = []
    for repeats in (2, 20):
        measured.begin()
        for _ in range(repeats):
            ranks.module(clip)
        times.append(measured.own_seconds(waited=0)[0])
    assert 5 < times[1] / times[0] < 20
