from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from dist_train.models.resnet3d import ResNet3D


def _randomise_norms(model: nn.Module) -> None:
    """Give normalisation layers random biases and running statistics, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.fixture
def randomise_norms() -> Callable[[nn.Module], None]:
    return _randomise_norms


@pytest.fixture
def make_model() -> Callable[..., ResNet3D]:
    """Build the same model each time it is called with the same arguments."""

    def make(depth: int, **settings: object) -> ResNet3D:
        torch.manual_seed(0)
        model = ResNet3D(depth, **settings)
        _randomise_norms(model)
        return model

    return make


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one thread, torch's own CPU 1x1x1 convolution returns the contiguous layout."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
