"""ResNet3D against the ResNets of MONAI, which were written independently.

MONAI's shortcut convolutions have a bias and ours have none, since batch normalisation takes it
away again: by itself in training mode, and in eval mode once it is taken off the running mean.
"""

import re
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import resnet50, resnet101
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


def our_name(name: str, depth: int) -> str:
    module, tensor = name.rsplit(".", 1)
    in_block = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", module)
    if in_block is None:
        return f"{OUTSIDE_BLOCKS[module]}.{tensor}"
    layer, number, module = in_block.groups()
    number = sum(BLOCKS[depth][1][: int(layer) - 1]) + int(number)
    return f"blocks.{number}.{INSIDE_BLOCKS[module]}.{tensor}"


def shortcut_biases(theirs: nn.Module) -> set[str]:
    return {name for name, _ in theirs.named_parameters() if name.endswith("downsample.0.bias")}


def our_state(theirs: nn.Module, depth: int) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for name in shortcut_biases(theirs):
        state[name.replace("0.bias", "1.running_mean")] -= state.pop(name)
    return {our_name(name, depth): tensor for name, tensor in state.items()}


def make_pair(
    stem_stride: tuple[int, int, int],
    randomise_norms: Callable[[nn.Module], None],
    depth: int,
    width: int,
) -> tuple[nn.Module, ResNet3D]:
    torch.manual_seed(0)
    theirs = {50: resnet50, 101: resnet101}[depth](
        spatial_dims=3,
        n_input_channels=1,
        num_classes=1,
        conv1_t_stride=stem_stride,
        widen_factor=width / 64,
    )
    randomise_norms(theirs)
    ours = ResNet3D(depth, stem_stride=stem_stride, width=width)
    ours.load_state_dict(our_state(theirs, depth))
    return theirs, ours


def random_clips() -> Tensor:
    return torch.randn(4, 1, 16, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_close_to_scale(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


def test_parameters_are_as_many_but_for_the_shortcut_biases(randomise_norms):
    with torch.device("meta"):
        theirs, ours = make_pair((1, 2, 2), randomise_norms, 101, 64)
    biases = shortcut_biases(theirs)
    assert len(biases) == 4
    counted = {n: p.numel() for n, p in theirs.named_parameters() if n not in biases}
    assert sum(p.numel() for p in ours.parameters()) == sum(counted.values()) == 85_203_265


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stem_stride", STEM_STRIDES)
@pytest.mark.parametrize(
    ("depth", "width"), [(50, 16), pytest.param(101, 64, marks=pytest.mark.soak)]
)
def test_logits_and_gradients_are_equal(randomise_norms, depth, width, stem_stride, training):
    """In float64: random norms amplify float32 rounding, which differs between CPUs."""
    dtype = torch.float64
    pair = make_pair(stem_stride, randomise_norms, depth, width)
    theirs, ours = (m.to(dtype).train(training) for m in pair)
    clips = random_clips().to(dtype)
    expected = theirs(clips).squeeze(1)
    logits = ours(clips)
    assert_close_to_scale(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()

    biases = shortcut_biases(theirs)
    grads = {n: p.grad for n, p in ours.named_parameters()}
    expected_grads = {
        our_name(n, depth): p.grad for n, p in theirs.named_parameters() if n not in biases
    }
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close_to_scale(grad, expected_grads[name])
    if training:
        state = our_state(theirs, depth)
        for name, buffer in ours.named_buffers():
            assert_close_to_scale(buffer, state[name])
