"""One process's backend: arithmetic, state by name, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dist_train.config import OptimSettings, TrainSettings
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend, autocast
from dist_train.errors import BackendError
from dist_train.training.optimizer import make_optimizer

FP32 = TrainSettings(precision="fp32")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)
    )


def made() -> Backend:
    backend = make_backend(FP32, clip_norm=0.5)
    backend.wrap(network(), lambda model: make_optimizer(model, OptimSettings(lr=0.1)))
    return backend


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = made()
    yield backend
    backend.close()


def step(backend: Backend, seed: int) -> float:
    inputs = torch.randn(4, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    with backend.accumulating(last=True):
        backend.backward(backend.model(inputs).square().mean())
    return backend.update()


def test_the_norm_is_that_before_clipping_and_the_step_that_after(backend: Backend) -> None:
    """Against torch's own AdamW and clipping."""
    twin = network()
    optimizer = make_optimizer(twin, OptimSettings(lr=0.1))
    inputs = torch.randn(4, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    twin(inputs).square().mean().backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.reshape(-1) for p in twin.parameters()]))
    nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer.step()
    backend.set_lr(0.1)
    assert step(backend, 1) == pytest.approx(float(norm), rel=1e-6)
    assert norm > 0.5
    for (name, mine), other in zip(
        backend.module.named_parameters(), twin.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, msg=name)
        assert mine.grad is None


def test_the_rate_that_is_set_is_the_rate_that_is_used(backend: Backend) -> None:
    before = [p.detach().clone() for p in backend.module.parameters()]
    backend.set_lr(0.0)
    step(backend, 1)
    assert all(map(torch.equal, before, backend.module.parameters()))


def test_state_names_are_those_of_the_state(backend: Backend) -> None:
    names = backend.state_names()
    assert sorted(backend.state(lambda name: True)) == sorted(names), "before the first step"
    step(backend, 1)
    assert sorted(backend.state(lambda name: True)) == sorted(names)
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {"model", "exp_avg", "exp_avg_sq"}
    assert list(backend.state(lambda name: name == names[0])) == names[:1]


def copied(backend: Backend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.state(lambda name: True).items()}


def test_a_restored_state_goes_on_bit_for_bit(backend: Backend) -> None:
    for seed in range(3):
        step(backend, seed)
    state = copied(backend)
    norms = [step(backend, seed) for seed in range(3, 6)]
    straight = copied(backend)

    other = made()
    other.load_state(state, updates=3)
    assert [step(other, seed) for seed in range(3, 6)] == norms
    resumed = copied(other)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_is_the_precision_of_the_run(precision: str, dtype: torch.dtype) -> None:
    with autocast(precision, torch.device("cpu")):
        assert nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@on_a_cpu
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp16"}, "fp16 needs a CUDA device"),
        ({"precision": "fp16", "backend": "fsdp2"}, "fp16 is not offered under FSDP"),
        ({"graphs": True}, "there are 1 on cpu"),
        ({"backend": "zero2"}, "ZeRO needs a launcher"),
        ({"backend": "fsdp2"}, "FSDP needs a launcher"),
    ],
)
def test_refused_for_one_process_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], message: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = TrainSettings.model_validate({"precision": "fp32"} | given)
    with pytest.raises(BackendError, match=message):
        make_backend(settings, clip_norm=None)


def test_ddp_is_refused_where_the_launcher_asks_for_deepspeed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(BackendError, match="asks for DDP, but the launcher for DeepSpeed"):
        make_backend(FP32, clip_norm=None)


@on_a_cpu
def test_a_process_can_train_in_one_precision_after_another() -> None:
    """Also after a backend that was refused."""
    for precision in ("bf16", "fp32", "bf16"):
        made = make_backend(TrainSettings.model_validate({"precision": precision}), clip_norm=None)
        expected = {"bf16": "bf16", "fp32": "no"}[precision]
        assert made.accelerator.mixed_precision == expected
        made.close()
        with pytest.raises(BackendError, match="there are 1 on cpu"):
            make_backend(TrainSettings(precision="fp32", graphs=True), clip_norm=None)
