"""ResNet3D against the ResNet-101 of MONAI, which was written independently.

MONAI's shortcut convolutions have a bias and ours have none, since batch normalisation takes it
away again: by itself in training mode, and in eval mode once it is taken off the running mean.
"""

import re
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import resnet101
from torch import Tensor, nn

from dist_train.models.resnet3d import BLOCKS, ResNet3D

OUTSIDE_BLOCKS = {"conv1": "stem.conv", "bn1": "stem.norm", "fc": "head"}
INSIDE_BLOCKS = {
    "conv1": "conv1.conv",
    "bn1": "conv1.norm",
    "conv2": "conv2.conv",
    "bn2": "conv2.norm",
    "conv3": "conv3.conv",
    "bn3": "conv3.norm",
    "downsample.0": "shortcut.conv",
    "downsample.1": "shortcut.norm",
}
STEM_STRIDES = [(1, 1, 1), (1, 2, 2)]  # MONAI's default, ours


def our_name(name: str) -> str:
    module, tensor = name.rsplit(".", 1)
    in_block = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", module)
    if in_block is None:
        return f"{OUTSIDE_BLOCKS[module]}.{tensor}"
    layer, number, module = in_block.groups()
    number = sum(BLOCKS[101][1][: int(layer) - 1]) + int(number)
    return f"blocks.{number}.{INSIDE_BLOCKS[module]}.{tensor}"


def shortcut_biases(theirs: nn.Module) -> set[str]:
    return {name for name, _ in theirs.named_parameters() if name.endswith("downsample.0.bias")}


def our_state(theirs: nn.Module) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for name in shortcut_biases(theirs):
        state[name.replace("0.bias", "1.running_mean")] -= state.pop(name)
    return {our_name(name): tensor for name, tensor in state.items()}


def make_pair(
    stem_stride: tuple[int, int, int], randomise_norms: Callable[[nn.Module], None]
) -> tuple[nn.Module, ResNet3D]:
    torch.manual_seed(0)
    theirs = resnet101(
        spatial_dims=3, n_input_channels=1, num_classes=1, conv1_t_stride=stem_stride
    )
    randomise_norms(theirs)
    ours = ResNet3D(101, stem_stride=stem_stride)
    ours.load_state_dict(our_state(theirs))
    return theirs, ours


def random_clips() -> Tensor:
    return torch.randn(2, 1, 16, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_close_to_scale(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


def test_parameters_are_as_many_but_for_the_shortcut_biases(randomise_norms):
    theirs, ours = make_pair((1, 2, 2), randomise_norms)
    biases = shortcut_biases(theirs)
    assert len(biases) == 4
    counted = {n: p.numel() for n, p in theirs.named_parameters() if n not in biases}
    assert sum(p.numel() for p in ours.parameters()) == sum(counted.values()) == 85_203_265


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stem_stride", STEM_STRIDES)
def test_logits_and_gradients_are_equal(randomise_norms, stem_stride, training):
    """In float64: rounding in float32, which differs by CPU, is blown up by random norms."""
    dtype = torch.float64
    theirs, ours = (m.to(dtype).train(training) for m in make_pair(stem_stride, randomise_norms))
    clips = random_clips().to(dtype)
    expected = theirs(clips).squeeze(1)
    logits = ours(clips)
    assert_close_to_scale(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()

    biases = shortcut_biases(theirs)
    grads = {n: p.grad for n, p in ours.named_parameters()}
    expected_grads = {our_name(n): p.grad for n, p in theirs.named_parameters() if n not in biases}
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close_to_scale(grad, expected_grads[name])
    if training:
        state = our_state(theirs)
        for name, buffer in ours.named_buffers():
            assert_close_to_scale(buffer, state[name])
