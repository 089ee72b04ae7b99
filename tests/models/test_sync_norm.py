"""Two processes against one process that has the batches of both."""

from __future__ import annotations

import copy

import pytest
import torch
from tensors import Calls, assert_two_processes_equal_one
from torch import Tensor

from dist_train.models.norm import BatchNorm3d, share_statistics
from dist_train.models.padding import clear_padding, valid_frames
from dist_train.models.resnet3d import ResNet3D

# The second process has more clips, of which none is padded.
FRAMES = [[9, 12], [12, 12, 12]]
DEPTH = 12


def model_and_clips(precision: torch.dtype) -> tuple[ResNet3D, Tensor]:
    torch.manual_seed(0)
    model = ResNet3D(50, width=4).to(precision)
    clips = torch.randn(sum(map(len, FRAMES)), 1, DEPTH, 32, 32, dtype=torch.float64) + 0.5
    return model, clips.to(precision)


# How each process recomputes.
@pytest.mark.parametrize(
    "modes", [["none", "none"], ["cheap", "stage"], ["block", "cheap"]], ids=str
)
def test_two_processes_equal_one_on_both_batches(modes: list[str]) -> None:
    """Rounding alone, by another order of the clips, moves these gradients by 3e-11."""
    model, clips = model_and_clips(torch.float64)
    models = [copy.deepcopy(model) for _ in range(3)]
    for replica, mode in zip(models, modes, strict=False):
        replica.recompute = mode
    assert_two_processes_equal_one(
        models, clips, FRAMES, lambda model, x, frames: model(x, frames), 1e-10
    )


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)
def test_one_layer(precision: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    clips = torch.randn(5, 4, DEPTH, 3, 3, dtype=torch.float64).to(precision) + 3
    norms = [BatchNorm3d(4).to(precision) for _ in range(3)]
    assert_two_processes_equal_one(
        norms, clips, FRAMES, lambda norm, x, frames: norm(x, valid_frames(frames, x)), tolerance
    )


@pytest.mark.parametrize("mode", ["none", "cheap", "stage"])
def test_statistics_of_all_layers_move_by_a_few_calls(mode: str) -> None:
    """Bit-identical to updating each layer by itself."""
    model, clips = model_and_clips(torch.float32)
    share_statistics(model, lambda sums: None)
    model.recompute = mode
    alone = copy.deepcopy(model)
    frames = torch.tensor([*FRAMES[0], *FRAMES[1]])
    valid = valid_frames(frames, clips)
    for _ in range(2):
        with Calls() as calls:
            model(clips, frames).sum().backward()
        assert len(calls.of("lerp_")) == len(calls.of("_foreach_lerp_")) == 2
        assert len(calls.of("_foreach_add_")) == 1
        x = clear_padding(clips, valid)
        for step in (step for part in alone.parts(valid)[0] for step in part):
            x = step(x)
    for (name, together), by_itself in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(together, by_itself), name
    assert model.stem.norm.num_batches_tracked == 2


def test_after_an_error_no_statistics_have_moved() -> None:
    model, clips = model_and_clips(torch.float32)
    share_statistics(model, lambda sums: None)
    before = copy.deepcopy(model.state_dict())
    broken = model.blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(clips)
    broken.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(clips)
    assert model.stem.norm.num_batches_tracked == 1


def test_the_gradient_has_the_saved_statistics_that_cuda_takes_it_from() -> None:
    norm = BatchNorm3d(3)
    share_statistics(norm, lambda sums: None)
    x = torch.randn(4, 3, 2, 5, 5, requires_grad=True)
    y = norm(x)
    with Calls() as calls:
        y.square().sum().backward()
    ((*_, mean, inverse, _, _, _),) = calls.of("native_batch_norm_backward")
    assert mean is not None
    assert inverse is not None
    by_channel = x.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, by_channel.mean(1))
    expected = (by_channel.var(1, correction=0) + norm.eps).rsqrt()
    torch.testing.assert_close(inverse, expected)
