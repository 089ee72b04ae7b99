"""Two processes against one process that has the batches of both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tensors import Calls, assert_equal
from torch import Tensor, nn

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


def results(model: nn.Module) -> dict[str, Tensor]:
    """Gradients, summed over the processes, and buffers."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if dist.is_initialized():
        for grad in found.values():
            dist.all_reduce(grad)
    return found | dict(model.named_buffers())


# How each process recomputes; and precisions of a single layer.
MODES = [["none", "none"], ["cheap", "stage"], ["block", "cheap"]]
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    counts = [len(frames) for frames in FRAMES]
    for modes in MODES:
        model, clips = model_and_clips(torch.float64)
        model.recompute = modes[rank]
        share_statistics(model, dist.all_reduce)
        mine = clips.split(counts)[rank]
        model(mine, torch.tensor(FRAMES[rank])).square().sum().backward()
        torch.save(results(model), f"{folder}/{modes}-{rank}")
    for precision, _ in PRECISIONS:
        mine = layer_clips(precision).split(counts)[rank]
        found = one_layer(mine, FRAMES[rank], shared=True)
        torch.save(found, f"{folder}/{precision}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two processes, all from one launch, as starting them takes the longest."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    return folder


# Rounding alone, by another order of the clips, moves this network's gradients by 3e-11 in float64.
@pytest.mark.parametrize("modes", MODES, ids=str)
def test_two_processes_equal_one_on_both_batches(two_processes: Path, modes: list[str]) -> None:
    model, clips = model_and_clips(torch.float64)
    model(clips, torch.tensor([*FRAMES[0], *FRAMES[1]])).square().sum().backward()
    for rank in range(2):
        found = torch.load(two_processes / f"{modes}-{rank}")
        assert_equal(found, results(model), tolerance=1e-10)


def one_layer(clips: Tensor, frames: list[int], *, shared: bool) -> dict[str, Tensor]:
    norm = BatchNorm3d(4).to(clips.dtype)
    if shared:
        share_statistics(norm, dist.all_reduce)
    clips = clips.clone().requires_grad_()
    y = norm(clips, valid_frames(torch.tensor(frames), clips))
    (y * clips.detach().sin()).sum().backward()
    assert clips.grad is not None
    return results(norm) | {"y": y.detach(), "input": clips.grad}


def layer_clips(precision: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(5, 4, DEPTH, 3, 3, dtype=torch.float64, generator=generator).to(precision) + 3
    )


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS, ids=str)
def test_one_layer(two_processes: Path, precision: torch.dtype, tolerance: float) -> None:
    expected = one_layer(layer_clips(precision), [*FRAMES[0], *FRAMES[1]], shared=False)
    sizes = [len(frames) for frames in FRAMES]
    for rank in range(2):
        mine = {name: expected[name].split(sizes)[rank] for name in ("y", "input")}
        found = torch.load(two_processes / f"{precision}-{rank}")
        assert_equal(found, expected | mine, tolerance)


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
