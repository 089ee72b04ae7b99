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


def shift(backend: Backend) -> dict[str, Tensor]:
    """Change all weights and statistics; copies of what they are then."""
    with torch.no_grad():
        for tensor in backend.module.state_dict().values():
            tensor.add_(1)
    return weights_of(backend)


def weights_of(backend: Backend) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backend.module.state_dict().items()}


def everything(_: str) -> bool:
    return True


def test_it_is_the_moving_average_whose_decay_rises(backend: Backend) -> None:
    """By hand: the decays of the first four steps are 1/10, 2/11, 3/12 and 4/13."""
    first = weights_of(backend)
    ema = Ema(backend, 0.999)
    value = 0.0
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13)):
        shift(backend)
        ema.update(step)
        value = decay * value + (1 - decay) * (step + 1)
    averages = ema.state(everything)
    assert averages.keys() == {f"ema/{n}" for n, t in first.items() if t.is_floating_point()}
    for name, average in averages.items():
        torch.testing.assert_close(average, first[name.removeprefix("ema/")] + value)


def test_late_steps_decay_as_the_setting_says(backend: Backend) -> None:
    first = weights_of(backend)
    ema = Ema(backend, DECAY)
    shift(backend)
    ema.update(1000)
    torch.testing.assert_close(ema.state(everything)["ema/0.weight"], first["0.weight"] + 0.5)


def test_within_it_the_module_has_the_averages_and_then_its_own(backend: Backend) -> None:
    ema = Ema(backend, DECAY)
    own = shift(backend)
    ema.update(0)
    averages = averaged({f"model/{n}": t for n, t in own.items()} | ema.state(everything), own)
    averages = {name: tensor.clone() for name, tensor in averages.items()}
    assert not torch.equal(averages["1.running_mean"], own["1.running_mean"])
    with ema.in_place():
        for name, tensor in weights_of(backend).items():
            assert torch.equal(tensor, averages[name]), name
    for name, tensor in weights_of(backend).items():
        assert torch.equal(tensor, own[name]), name
    for name, tensor in ema.state(everything).items():
        assert torch.equal(tensor, averages[name.removeprefix("ema/")]), name


def test_a_state_taken_up_gives_the_same_averages(backend: Backend) -> None:
    ema = Ema(backend, DECAY)
    shift(backend)
    ema.update(0)
    kept = {name: tensor.clone() for name, tensor in ema.state(everything).items()}
    assert kept.keys() == ema.sizes().keys()
    assert [tensor.numel() for tensor in kept.values()] == list(ema.sizes().values())
    weights = {f"model/{name}": tensor for name, tensor in weights_of(backend).items()}
    other = Ema(backend, DECAY)
    other.load(weights | kept)
    for name, tensor in other.state(everything).items():
        assert torch.equal(tensor, kept[name]), name


def test_a_state_without_averages_gives_the_weights(backend: Backend) -> None:
    ema = Ema(backend, DECAY)
    first = weights_of(backend)
    shift(backend)
    ema.update(0)
    ema.load({f"model/{name}": tensor for name, tensor in first.items()})
    for name, tensor in ema.state(everything).items():
        assert torch.equal(tensor, first[name.removeprefix("ema/")]), name


def test_only_what_is_asked_for_is_given(backend: Backend) -> None:
    ema = Ema(backend, DECAY)
    assert ema.state(lambda name: name == "ema/0.bias").keys() == {"ema/0.bias"}


def test_without_a_decay_there_is_nothing(backend: Backend) -> None:
    own = weights_of(backend)
    ema = Ema(backend, None)
    ema.update(0)
    with ema.in_place():
        assert all(torch.equal(own[n], t) for n, t in weights_of(backend).items())
    assert ema.sizes() == ema.state(everything) == {}
