"""The average of weights, on one process; under every backend in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dist_train.config import OptimSettings, TrainSettings
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend
from dist_train.training.ema import Ema, averaged
from dist_train.training.optimizer import make_optimizer

DECAY = 0.5


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch.manual_seed(0)
    made = make_backend(TrainSettings(precision="fp32"), clip_norm=None)
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    made.wrap(model, lambda m: make_optimizer(m, OptimSettings(lr=0.1)))
    yield made
    made.close()


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def weights_of(backend: Backend) -> dict[str, Tensor]:
    return copied(backend.module.state_dict())


def shift(backend: Backend) -> dict[str, Tensor]:
    """Change all weights and statistics, and return copies of them."""
    with torch.no_grad():
        for tensor in backend.module.state_dict().values():
            tensor.add_(1)
    return weights_of(backend)


def state_of(ema: Ema) -> dict[str, Tensor]:
    return copied(ema.state(lambda name: True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_it_is_the_moving_average_whose_decay_rises(backend: Backend) -> None:
    """By hand: the decays of the first steps are 1/10, 2/11, 3/12 and 4/13. Late steps have the
    decay of the setting."""
    first = weights_of(backend)
    ema = Ema(backend, 0.999)
    value = 0.0
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13)):
        shift(backend)
        ema.update(step)
        value = decay * value + (1 - decay) * (step + 1)
    averages = state_of(ema)
    assert averages.keys() == {f"ema/{n}" for n, t in first.items() if t.is_floating_point()}
    for name, average in averages.items():
        torch.testing.assert_close(average, first[name.removeprefix("ema/")] + value)
    ema = Ema(backend, DECAY)
    before = weights_of(backend)["0.weight"]
    shift(backend)
    ema.update(1000)
    torch.testing.assert_close(state_of(ema)["ema/0.weight"], before + 0.5)


def test_within_it_the_module_has_the_averages_and_then_its_own(backend: Backend) -> None:
    ema = Ema(backend, DECAY)
    own = shift(backend)
    ema.update(0)
    before = state_of(ema)
    averages = averaged({f"model/{n}": t for n, t in own.items()} | before, own)
    assert not torch.equal(averages["1.running_mean"], own["1.running_mean"])
    with ema.in_place():
        assert_same(weights_of(backend), averages)
    assert_same(weights_of(backend), own)
    assert_same(state_of(ema), before)


def test_a_loaded_state_gives_the_same_averages(backend: Backend) -> None:
    """A state without averages gives the weights."""
    ema = Ema(backend, DECAY)
    shift(backend)
    ema.update(0)
    kept = state_of(ema)
    assert ema.sizes() == {name: tensor.numel() for name, tensor in kept.items()}
    assert ema.state(lambda name: name == "ema/0.bias").keys() == {"ema/0.bias"}
    weights = {f"model/{name}": tensor for name, tensor in weights_of(backend).items()}
    other = Ema(backend, DECAY)
    other.load(weights | kept)
    assert_same(state_of(other), kept)
    other.load(weights)
    assert_same(state_of(other), {name: weights[f"model/{name[4:]}"] for name in kept})


def test_without_a_decay_there_is_nothing(backend: Backend) -> None:
    own = weights_of(backend)
    ema = Ema(backend, None)
    ema.update(0)
    with ema.in_place():
        assert_same(weights_of(backend), own)
    assert ema.sizes() == ema.state(lambda name: True) == {}
