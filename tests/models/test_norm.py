import copy

import pytest
import torch
from tensors import Calls
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.norm import BatchNorm3d, set_momentum, share_statistics
from dist_train.models.norm_statistics import by_running_and_own_statistics
from dist_train.models.padding import valid_frames

FRAMES = torch.tensor([5, 2, 7])
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def random_clips(dtype: torch.dtype = torch.float32) -> Tensor:
    """Values far from mean 0 and variance 1, different in each frame."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(3, 4, 7, 3, 2, dtype=dtype, generator=generator)
    return clips * torch.arange(1, 8).view(1, 1, 7, 1, 1) + 3


def random_norm(**settings: torch.dtype) -> BatchNorm3d:
    torch.manual_seed(1)
    norm = BatchNorm3d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm.to(**settings)


def joined(clips: Tensor) -> Tensor:
    """The real frames of all clips as one clip [1, C, N, H, W]."""
    parts = [clip[:, :n] for clip, n in zip(clips, FRAMES, strict=True)]
    return torch.cat(parts, dim=1)[None]


@pytest.mark.parametrize("training", [True, False])
def test_without_padding_it_is_that_of_torch(training):
    ours = random_norm().train(training)
    theirs = nn.BatchNorm3d(4).train(training)
    theirs.load_state_dict(ours.state_dict())
    clips = random_clips()
    results = []
    for norm in (ours, theirs):
        x = clips.clone().requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        results.append([y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("batch", "dtype"), [(3, torch.float32), (1, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["plain", "channels last"]
)
def test_frames_are_normalised_as_images_without_a_copy(layout, dtype, batch, shared):
    """As 4-D tensors, for which CUDA has channels-last kernels."""
    clips = random_clips()[:batch].to(dtype).contiguous(memory_format=layout)
    norm = random_norm()
    x = clips.clone().requires_grad_()
    if shared:
        share_statistics(norm, lambda sums: None)
    with Calls() as calls:
        y = norm(x)
        y.backward(torch.sin(clips))
    backward = calls.of("native_batch_norm_backward")
    inputs = [args[0] for args in calls.of("batch_norm")] + [args[1] for args in backward]
    assert len(inputs) == (4 if shared else 3)
    images = torch.channels_last if layout is torch.channels_last_3d else torch.contiguous_format
    for given in inputs:
        assert given.shape == (batch, 4, 21, 2)
        assert given.is_contiguous(memory_format=images)
    assert inputs[0].data_ptr() == x.data_ptr()
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("training", [True, False])
def test_real_frames_are_normalised_as_if_they_were_one_unpadded_clip(training):
    norm = random_norm(dtype=torch.float64).train(training)
    reference = copy.deepcopy(norm)
    clips = random_clips(torch.float64).requires_grad_()
    y = norm(clips, valid_frames(FRAMES, clips))
    expected = reference(joined(clips))
    torch.testing.assert_close(joined(y), expected)
    for name in BUFFERS:
        torch.testing.assert_close(getattr(norm, name), getattr(reference, name))

    weights = torch.randn_like(expected)
    (x_grad,) = torch.autograd.grad((joined(y) * weights).sum(), clips)
    (x_grad_expected,) = torch.autograd.grad((expected * weights).sum(), clips)
    torch.testing.assert_close(x_grad, x_grad_expected)


def test_running_statistics_are_the_mean_and_unbiased_variance_of_real_voxels():
    norm = random_norm()
    set_momentum(nn.Sequential(norm), 0.25)
    clips = random_clips()
    norm(clips, valid_frames(FRAMES, clips))
    voxels = joined(clips).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(norm.running_mean.double(), 0.25 * voxels.mean(dim=1))
    torch.testing.assert_close(norm.running_var.double(), 0.75 + 0.25 * voxels.var(dim=1))

    blind = random_norm()
    blind(clips)
    assert (blind.running_mean - norm.running_mean).abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_padded_frames_become_zero_and_have_no_gradient(training):
    norm = random_norm().train(training)
    clips = random_clips()
    clips[1, :, 2:] = float("nan")
    clips.requires_grad_()
    y = norm(clips, valid_frames(FRAMES, clips))
    y.square().sum().backward()
    assert clips.grad is not None
    for b, n in enumerate(FRAMES):
        assert not y[b, :, n:].any()
        assert not clips.grad[b, :, n:].any()
    assert torch.isfinite(y).all()
    assert torch.isfinite(norm.running_mean).all()


def test_a_single_value_per_channel_has_no_variance():
    norm = random_norm()
    with pytest.raises(ModelError, match="single value per channel"):
        norm(torch.zeros(1, 4, 1, 1, 1))
    padded = torch.zeros(1, 4, 3, 1, 1)
    with pytest.raises(ModelError, match="single value per channel"):
        norm(padded, valid_frames(torch.tensor([1]), padded))
    assert norm.eval()(torch.zeros(1, 4, 1, 1, 1)).shape == (1, 4, 1, 1, 1)


def test_what_running_statistics_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), random_norm()).train()
    with torch.no_grad():
        model[1].running_mean.fill_(2.0)
    before = copy.deepcopy(model.state_dict())
    clips = random_clips()
    running, own = by_running_and_own_statistics(model, clips)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[1].observer is None
    twin = copy.deepcopy(model[1])
    assert torch.equal(running, twin.eval()(clips))
    assert torch.equal(own, twin.train()(clips))
    assert (own - running).abs().max() > 0.1
    model.eval()
    assert torch.equal(by_running_and_own_statistics(model, clips)[0], running)
    assert not model[1].training
