"""Training on the CPU is asked for, or there is no launcher; it does not come by itself."""

from __future__ import annotations

import pytest
import torch

from dist_train.config import TrainSettings
from dist_train.distributed.device import chosen_cuda
from dist_train.errors import BackendError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


def settings(device: str) -> TrainSettings:
    return TrainSettings.model_validate({"device": device})


def test_one_process_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert chosen_cuda(settings("auto")) is False
    assert chosen_cuda(settings("cpu")) is False
    with pytest.raises(BackendError, match="no CUDA device here, and it asks for one"):
        chosen_cuda(settings("cuda"))


def test_under_a_launcher_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert chosen_cuda(settings("cpu")) is False
    for device in ("auto", "cuda"):
        with pytest.raises(BackendError, match=r"train\.device=cpu to use CPUs"):
            chosen_cuda(settings(device))
