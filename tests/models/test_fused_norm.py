"""The compiled loops against the plain layers. Slow, as the loops must be compiled."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import losses_of, overrides, tiny_config, tiny_store
from tensors import assert_equal, assert_two_processes_equal_one
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from dist_train import cli
from dist_train.errors import ModelError
from dist_train.models import fused_norm
from dist_train.models.norm import BatchNorm3d, fuse, norms
from dist_train.models.norm_statistics import precise_statistics
from dist_train.models.padding import valid_frames
from dist_train.models.resnet3d import ResNet3D
from dist_train.run.model import make_model as make_run_model
from dist_train.training.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here"),
]
DEPTH = 12
FRAMES = {"full": None, "padded": torch.tensor([9, 12, 2])}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> Iterator[None]:
    """Raise the compiler's limit of variants: the tests share the compiled loops, and beyond the
    limit the compiler silently runs the plain functions."""
    limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def random_norm(dtype: torch.dtype, *, fused: bool) -> BatchNorm3d:
    torch.manual_seed(1)
    norm = BatchNorm3d(5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    norm.running_mean.uniform_(-1, 4)
    if fused:
        fuse(norm)
    return norm.to(dtype)


def random_clips(dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(3, 5, DEPTH, 4, 2, dtype=torch.float64, generator=generator)
    return (clips.to(dtype) + 3).to(memory_format=torch.channels_last_3d)


def one_layer(
    norm: BatchNorm3d, clips: Tensor, frames: Tensor | None, *, plus: bool, relu: bool
) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after one forward and backward pass."""
    x = clips.clone().requires_grad_()
    valid = valid_frames(frames, clips)
    real = torch.ones(()) if valid is None else valid.mask[:, None, :, None, None]
    added = (random_clips(clips.dtype, 1) - 3).mul(real).requires_grad_()
    y = norm(x, valid, shortcut=added if plus else None, relu=relu)
    (y * clips.sin()).sum().backward()
    assert x.grad is not None
    results = {"y": y.detach(), "x": x.grad, **dict(norm.named_buffers())}
    results |= {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    if plus:
        assert added.grad is not None
        # Plainly, padded frames have a gradient here too, which goes nowhere.
        results["plus"] = added.grad * real
    return results


# --- in a network ---------------------------------------------------------------------------------


def trained(model: ResNet3D, frames: Tensor | None, depth: int = 20) -> dict[str, Tensor]:
    """Loss, gradients and buffers after a step, with dropout from a fixed random state."""
    torch.manual_seed(2)
    dtype = model.head.weight.dtype
    clips = torch.rand(
        3, 1, depth, 48, 48, dtype=dtype, generator=torch.Generator().manual_seed(3)
    ).to(memory_format=torch.channels_last_3d)
    model.zero_grad()
    loss = model(clips, frames).square().sum()
    loss.backward()
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | left | dict(model.named_buffers())


def make_model(dtype: torch.dtype, *, fused: bool, depth: int = 50) -> ResNet3D:
    torch.manual_seed(0)
    model = ResNet3D(depth, width=4, dropout=0.5).to(dtype)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    if fused:
        fuse(model)
    return model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def test_other_depths_need_no_other_code() -> None:
    # No loop is left that another test's dtypes and shapes were compiled for.
    torch._dynamo.reset()
    counters.clear()
    model = make_model(torch.float32, fused=True, depth=18)
    for depth, frames in ((16, None), (20, [20, 9, 13]), (24, [9, 24, 24]), (36, None)):
        trained(model, None if frames is None else torch.tensor(frames), depth)
        if depth == 20:
            compiled = counters["stats"]["unique_graphs"]
            assert compiled >= 4
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("frames", [None, torch.tensor([20, 9, 13])], ids=["full", "padded"])
def test_a_network(frames: Tensor | None) -> None:
    fused, plain = (
        trained(make_model(torch.float64, fused=fused), frames) for fused in (True, False)
    )
    assert_equal(fused, plain, 1e-9)


def test_recomputing_changes_no_bit() -> None:
    frames = torch.tensor([20, 9, 13])
    expected = trained(make_model(torch.float64, fused=True, depth=18), frames)
    for mode in ("cheap", "block", "stage"):
        model = make_model(torch.float64, fused=True, depth=18)
        model.recompute = mode
        left = trained(model, frames)
        assert [name for name in left if not torch.equal(left[name], expected[name])] == [], mode


def test_statistics_of_the_population_see_every_layer() -> None:
    fused, plain = (make_model(torch.float64, fused=fused) for fused in (True, False))
    clips = torch.rand(4, 1, 16, 48, 48, dtype=torch.float64)
    for model in (fused, plain):
        model.train()
        with precise_statistics(model), torch.no_grad():
            torch.manual_seed(0)
            model(clips)
    assert_equal(dict(fused.named_buffers()), dict(plain.named_buffers()), 1e-9)


# --- a layer --------------------------------------------------------------------------------------


# Each layout of each dtype is compiled by itself.
@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "layout"),
    [
        (torch.float64, 1e-12, torch.channels_last_3d),
        (torch.float32, 1e-5, torch.contiguous_format),
    ],
    ids=str,
)
def test_a_layer(
    dtype: torch.dtype, tolerance: float, frames: Tensor | None, layout: torch.memory_format
) -> None:
    clips = random_clips(dtype).contiguous(memory_format=layout)
    for plus, relu in ((False, False), (False, True), (True, True)):
        fused, plain = (
            one_layer(random_norm(dtype, fused=fused), clips, frames, plus=plus, relu=relu)
            for fused in (True, False)
        )
        assert_equal(fused, plain, tolerance)


def test_a_layer_in_bfloat16() -> None:
    """Activations in bfloat16, statistics and parameters in float32: both versions round the
    output and the gradient once."""
    clips = random_clips(torch.float32).bfloat16()
    found, expected = (
        one_layer(random_norm(torch.float32, fused=fused), clips, None, plus=False, relu=True)
        for fused in (True, False)
    )
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    assert_equal(found, expected, 2**-7)


def test_statistics_far_from_zero_do_not_cancel() -> None:
    clips = random_clips(torch.float32) + 1e4
    norm = random_norm(torch.float32, fused=True)
    norm.running_mean.fill_(1e4)
    norm.running_var.zero_()
    norm(clips)
    expected = clips.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norm.running_var.double(), 0.1 * expected, rtol=1e-5, atol=0)


def test_in_evaluation_it_is_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "_to_output", lambda *_: pytest.fail("the loop was called"))
    clips = random_clips(torch.float32)
    fused, plain = (random_norm(torch.float32, fused=fused).eval() for fused in (True, False))
    assert torch.equal(fused(clips), plain(clips))


def test_a_single_value_has_no_variance() -> None:
    norm = random_norm(torch.float32, fused=True)
    with pytest.raises(ModelError, match="a single value"):
        norm(torch.zeros(1, 5, 1, 1, 1))
    clips = torch.zeros(1, 5, 2, 1, 1)
    valid = valid_frames(torch.tensor([1]), clips)
    with pytest.raises(ModelError, match="a single value"):
        norm(clips, valid)


# --- shared by two processes ----------------------------------------------------------------------


def test_two_processes_are_as_one_with_the_clips_of_both() -> None:
    layers = [random_norm(torch.float64, fused=fused) for fused in (True, True, False)]
    assert_two_processes_equal_one(
        layers,
        random_clips(torch.float64),
        [[9, 12], [12]],
        lambda norm, x, frames: norm(x, valid_frames(frames, x), relu=True),
        1e-12,
    )


# --- what a user sees -----------------------------------------------------------------------------


def test_a_run_goes_as_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tiny_store(tmp_path / "store")
    called = {True: 0, False: 0}
    for fused in (True, False):
        loop = fused_norm._to_output

        def counted(*arguments: Any, fused: bool = fused, loop: Any = loop) -> Any:
            called[fused] += 1
            return loop(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(fused_norm, "_to_output", counted)
            config = tiny_config(store, tmp_path / str(fused), f"norm.fused={fused}")
            train(config)
    # Of 18 steps, in each layer.
    assert called[True] >= 18 * len([*norms(make_run_model(config))])
    assert called[False] == 0
    fused, plain = (losses_of(tmp_path / str(fused)) for fused in (True, False))
    assert fused == pytest.approx(plain, rel=1e-4)


def test_without_a_compiler_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = overrides(tiny_store(tmp_path / "store"), tmp_path / "run", "norm.fused=true")
    monkeypatch.setattr(sys, "argv", ["dist-train", "train", *settings])
    # No code that was compiled before lies there either, in memory or in files.
    torch._dynamo.reset()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/none/g++",)})
    with fresh_cache(), no_compiler, pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "norm.fused: torch.compile does not work here" in said
    assert "Install a C++ compiler" in said
    assert "Traceback" not in said
