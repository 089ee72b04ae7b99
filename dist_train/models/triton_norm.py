"""The loops of fused normalisation by Triton kernels, for CUDA: see norm_loops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.models.norm_kernels import (
    gradient_sums_kernel,
    gradient_vectors_kernel,
    gradients_kernel,
    move_kernel,
    output_kernel,
    sums_kernel,
    vectors_kernel,
)
from dist_train.models.norm_loops import Vectors
from dist_train.models.shared_norm import Statistics

#: Channels of a tile: 128 bytes of bfloat16, which is how memory is read.
CHANNELS = 64
#: Rows of a tile.
ROWS = 64
#: Programs that take sums: some for each of a GPU's processors. Not by the device's number of them,
#: so that sums are the same on another.
PROGRAMS = 1024
#: Partial sums that are read at once, and channels of the program that adds them up.
PARTS, OF_PARTS = 128, 16


def sums(x: Tensor, real: Tensor | None, origin: Tensor) -> Tensor:
    return _sums(x, real, origin).sum(0, dtype=torch.float64)


def _sums(x: Tensor, real: Tensor | None, origin: Tensor) -> Tensor:
    """[N, 2C + 1]: of N parts of the rows."""
    rows, channels, across, per_program, of_parts = _split(x)
    parts = origin.new_empty(of_parts, 2 * channels + 1)
    sums_kernel[(of_parts * across,)](
        x, real, origin, parts, rows, x.shape[1], per_program, channels, ROWS, CHANNELS
    )
    return parts


def vectors(sums: Tensor, origin: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Vectors:
    """Also of sums of parts, [N, 2C + 1]."""
    channels = origin.shape[0]
    parts = sums.view(-1, 2 * channels + 1)
    of_channels = [torch.empty_like(origin) for _ in range(4)]
    mean, var, scale, shift = of_channels
    number = parts.new_empty(1)
    vectors_kernel[(_parts(channels, OF_PARTS),)](
        parts, origin, weight, bias, mean, var, number, scale, shift, parts.shape[0], channels, eps,
        PROGRAMS, PARTS, OF_PARTS, num_warps=8,
    )  # fmt: skip
    return Vectors(mean, var, number, scale, shift)


def output(
    x: Tensor, plus: Tensor | None, real: Tensor | None, vectors: Vectors, relu: bool
) -> Tensor:
    rows, channels, tiles = _tiles(x)
    y = torch.empty_like(x)
    output_kernel[(tiles,)](
        x, plus, real, vectors.scale, vectors.shift, y, rows, x.shape[1], channels,
        relu, ROWS, CHANNELS,
    )  # fmt: skip
    return y


def gradient_sums(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor | None,
    vectors: Vectors,
    eps: float,
    relu: bool,
    of_plus: Tensor | None = None,
) -> Tensor:
    """Also writes the gradient of what was added into ``of_plus``."""
    rows, channels, across, per_program, of_parts = _split(x)
    mean, var, _, scale, shift = vectors
    parts = mean.new_empty(of_parts, 2 * channels)
    gradient_sums_kernel[(of_parts * across,)](
        grad, x, y, real, mean, scale, shift, parts, of_plus, rows, x.shape[1], per_program,
        channels, relu, ROWS, CHANNELS,
    )  # fmt: skip
    found = mean.new_empty(2, channels)
    gradient_vectors_kernel[(_parts(channels, OF_PARTS),)](
        parts, var, found, of_parts, channels, eps, PARTS, OF_PARTS, num_warps=8
    )
    return found


def gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor | None,
    sums: Tensor,
    vectors: Vectors,
    eps: float,
    relu: bool,
    into_plus: bool,
) -> tuple[Tensor, Tensor | None]:
    rows, channels, tiles = _tiles(x)
    mean, var, number, scale, shift = vectors
    of_x, of_plus = torch.empty_like(x), torch.empty_like(x) if into_plus else None
    gradients_kernel[(tiles,)](
        grad, x, y, real, sums, mean, var, number, scale, shift, of_x, of_plus,
        rows, x.shape[1], channels, eps, relu, ROWS, CHANNELS,
    )  # fmt: skip
    return of_x, of_plus


def to_output(
    x: Tensor,
    plus: Tensor | None,
    real: Tensor | None,
    origin: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Vectors]:
    found = vectors(_sums(x, real, origin), origin, weight, bias, eps)
    return output(x, plus, real, found, relu), found


def to_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor | None,
    vectors: Vectors,
    eps: float,
    relu: bool,
    into_plus: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not into_plus:
        found = gradient_sums(grad, x, y, real, vectors, eps, relu)
        return found, *gradients(grad, x, y, real, found, vectors, eps, relu, False)
    # It is what is rectified already: the second loop need not look again at what was.
    of_plus = torch.empty_like(x)
    found = gradient_sums(grad, x, y, real, vectors, eps, relu, of_plus)
    of_x, _ = gradients(of_plus, x, None, real, found, vectors, eps, False, False)
    return found, of_x, of_plus


def move(
    running_mean: Tensor,
    running_var: Tensor,
    steps: Tensor,
    statistics: Statistics,
    momentum: float,
) -> None:
    channels = running_mean.shape[0]
    move_kernel[(_parts(channels, CHANNELS),)](
        running_mean, running_var, steps, *statistics, channels, momentum, CHANNELS
    )


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """Rows, channels, and how many tiles they make."""
    frames, pixels, channels = x.shape
    rows = frames * pixels
    return rows, channels, _parts(rows, ROWS) * _parts(channels, CHANNELS)


def _split(x: Tensor) -> tuple[int, int, int, int, int]:
    """Rows, channels, tiles across the channels, tiles that a program goes through along the rows,
    and programs along the rows."""
    rows, channels, tiles = _tiles(x)
    across = _parts(channels, CHANNELS)
    along = tiles // across
    per_program = _parts(along * across, PROGRAMS)
    return rows, channels, across, per_program, _parts(along, per_program)


def _parts(number: int, size: int) -> int:
    return -(-number // size)
