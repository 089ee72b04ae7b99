"""The kernels for CUDA against the same loops written out in torch: on a GPU as they are compiled,
elsewhere as Triton's interpreter runs them (see conftest.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, environment
from torch import Tensor

from dist_train.models import compiled_norm
from dist_train.models.norm_loops import Vectors
from dist_train.models.shared_norm import Statistics, move_running

pytest.importorskip("triton", reason="Triton is not installed")
from dist_train.models import triton_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
#: Frames, pixels and channels: less than a tile, and several with a rest in each direction.
SHAPES = [(6, 8, 5), (9, 50, 96)]


def plain(name: str) -> Any:
    """The loop as torch runs it line by line."""
    return getattr(compiled_norm, name).__wrapped__


class Rows:
    """Random activations of some frames of which some are real, and what normalises them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, padded: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64, generator=generator)

        frames, _, channels = shape
        self.of_vectors = torch.promote_types(dtype, torch.float32)
        self.x, self.plus, self.grad = (
            values.to(DEVICE, dtype)
            for values in (random(*shape) + 3, random(*shape), random(*shape))
        )
        self.every = torch.ones(frames, 1, 1, dtype=torch.bool, device=DEVICE)
        self.some = self.every.clone()
        self.some[1::3] = False
        # What padded frames hold must not matter.
        self.x[1::3] += 100.0 if padded else 0.0
        self.real = self.some if padded else None
        self.origin, self.weight, self.bias = (
            values.to(DEVICE, self.of_vectors)
            for values in (torch.full((channels,), 2.5), random(channels), random(channels))
        )

    @property
    def written_out(self) -> Tensor:
        return self.every if self.real is None else self.real


def assert_equal(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Up to a share of the largest value."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    worst = (found.double() - expected.double()).abs().max()
    assert worst <= tolerance * expected.double().abs().max()


each_case = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Of bfloat16 the last bit may differ, where sums in float32 do.
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)],
    ids=str,
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_padding = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
each_kind = pytest.mark.parametrize(
    ("plus", "relu"), [(False, False), (False, True), (True, True)], ids=str
)


@each_kind
@each_padding
@each_shape
@each_case
def test_one_process(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    shape: tuple[int, int, int],
    padded: bool,
    plus: bool,
    relu: bool,
) -> None:
    # So that a program goes through several tiles, and there are several programs.
    monkeypatch.setattr(triton_norm, "PROGRAMS", 4)
    rows = Rows(shape, dtype, padded=padded)
    added = rows.plus if plus else None
    of_norm = rows.origin, rows.weight, rows.bias, EPS, relu
    y, vectors = triton_norm.to_output(rows.x, added, rows.real, *of_norm)
    expected, of_expected = plain("to_output")(rows.x, added, rows.written_out, *of_norm)
    assert_equal(y, expected, tolerance)
    for found, wanted in zip(vectors, of_expected, strict=True):
        assert_equal(found, wanted, tolerance)
    kept = expected if plus else None
    back = of_expected, EPS, relu, plus
    grads = triton_norm.to_gradients(rows.grad, rows.x, kept, rows.real, *back)
    wanted = plain("to_gradients")(rows.grad, rows.x, kept, rows.written_out, *back)
    for found, of_torch in zip(grads, wanted, strict=True):
        assert (found is None) == (of_torch is None)
        if found is not None:
            assert_equal(found, of_torch, tolerance)


@each_padding
def test_several_processes(padded: bool) -> None:
    """Sums are handed out, and may come back as those of more rows than these."""
    rows = Rows(SHAPES[1], torch.float64, padded=padded)
    sums = triton_norm.sums(rows.x, rows.real, rows.origin)
    expected = torch.cat(plain("_sums")(rows.x, rows.written_out, rows.origin))
    assert_equal(sums, expected, 1e-12)
    more = expected * 1.5
    of_norm = rows.origin, rows.weight, rows.bias, EPS
    vectors = triton_norm.vectors(more, *of_norm)
    of_expected = plain("_vectors")(*more[:-1].chunk(2), more[-1:], *of_norm)
    for found, wanted in zip(vectors, of_expected, strict=True):
        assert_equal(found, wanted, 1e-12)
    y = triton_norm.output(rows.x, rows.plus, rows.real, of_expected, True)
    assert_equal(y, plain("output")(rows.x, rows.plus, rows.written_out, of_expected, True), 1e-12)
    back = of_expected, EPS, True
    own = triton_norm.gradient_sums(rows.grad, rows.x, y, rows.real, *back)
    of_torch = plain("gradient_sums")(rows.grad, rows.x, y, rows.written_out, *back)
    assert_equal(own, of_torch, 1e-12)
    shared = of_torch * 1.5
    grads = triton_norm.gradients(rows.grad, rows.x, y, rows.real, shared, *back, True)
    wanted = plain("gradients")(rows.grad, rows.x, y, rows.written_out, shared, *back, True)
    for found, expected in zip(grads, wanted, strict=True):
        assert found is not None
        assert_equal(found, expected, 1e-12)


def test_running_statistics_move_as_ever() -> None:
    rows = Rows(SHAPES[1], torch.float32, padded=False)
    mean, var = rows.weight, rows.bias.abs()
    statistics = Statistics(mean, var, torch.full((1,), 40.0, device=DEVICE))
    results = []
    for move in (triton_norm.move, move_running):
        running = rows.origin.clone(), rows.origin + 1
        steps = torch.tensor(7, device=DEVICE)
        move(*running, steps, statistics, 0.1)
        assert int(steps) == 8
        results.append(running)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_value_that_is_not_finite_spoils_its_channel() -> None:
    """Rectifying and clamping must not hide it."""
    rows = Rows(SHAPES[0], torch.float32, padded=False)
    rows.x[2, 3, 1] = float("nan")
    of_norm = rows.origin, rows.weight, rows.bias, EPS, True
    y, vectors = triton_norm.to_output(rows.x, None, None, *of_norm)
    assert isinstance(vectors, Vectors)
    assert vectors.var[1].isnan()
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2, 3, 4]].isfinite().all()


@pytest.mark.slow
def test_they_compile_for_a_gpu_and_read_16_bytes_at_once() -> None:
    """Also where there is no GPU. Of what is as large as activations, nothing is read by less."""
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment() | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, *instructions = line.split()
        assert "ld.global.b16" not in instructions, name
        assert "st.global.b16" not in instructions, name
        assert any(".v4." in instruction for instruction in instructions), name
    assert len(done.stdout.splitlines()) == 10
