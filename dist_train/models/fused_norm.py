"""Batch normalisation with the shortcut's sum and ReLU, in as few readings of memory as it takes.

``F.batch_norm``, ``+`` and ``F.relu`` each read and write all activations, and padding costs two
copies more. Here ``torch.compile`` makes two loops forward, for statistics and for the output, and
two backward, for sums and for gradients. What a convolution gives is read once in each, and only it
is kept, beside what the next layers keep anyway (as in-place activated batch normalisation has it,
Rota Bulò et al. 2018, but without inverting).

All of them work on rows: [F, P, C], the B * D frames, the H * W pixels, and the channels, which in
``channels_last_3d`` is how a batch [B, C, D, H, W] lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.errors import ModelError
from dist_train.models.padding import ValidFrames
from dist_train.models.recompute_once import once
from dist_train.models.sync_norm import AllReduce, Statistics

#: Else the compiler stores what is summed twice, as large as the activations, and reads it again.
ONE_LOOP: dict[str, Any] = {"realize_reads_threshold": 100, "realize_opcount_threshold": 1000}


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is first called: to ask for it takes seconds, and few runs need it."""

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True, options=ONE_LOOP)

    @wraps(function)
    def run(*arguments: Any) -> Any:
        return compiled()(*arguments)

    return run


def check_compiler(device: torch.device) -> None:
    """Compile one of the loops.

    Raises:
        ModelError: ``torch.compile`` does not work on the device.
    """
    rows, channels = torch.ones(2, 3, 4, device=device), torch.ones(4, device=device)
    try:
        _sums(rows, rows[:, :1, :1] > 0, channels)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"torch.compile does not work here: {type(error).__name__}: {reason}",
            where="norm.fused",
            fix="Install a C++ compiler for CPUs, or Triton for CUDA, or set norm.fused to false",
        ) from None


def fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    origin: Tensor,
    valid: ValidFrames | None,
    *,
    shortcut: Tensor | None,
    relu: bool,
    eps: float,
    all_reduce: AllReduce | None,
) -> tuple[Tensor, Statistics]:
    """Normalise the real frames of [B, C, D, H, W], add ``shortcut``, and rectify.

    Args:
        origin: [C], in the dtype to accumulate in: values near the means, such as running ones,
            around which sums of squares do not cancel (Chan, Golub & LeVeque 1983). Where
            processes share statistics it must be the same in all.
        all_reduce: with it, statistics are over all processes.

    Returns:
        In the dtype of ``x``, channels last, and zero in padded frames, with the statistics that it
        was normalised by. Gradients of weight and bias are those of this process's values.
    """
    options = _Options(relu=relu, eps=eps, all_reduce=all_reduce)
    y, *statistics = _FusedNorm.apply(  # type: ignore[no-untyped-call]
        x, shortcut, weight, bias, origin, _real(valid, x), options
    )
    return y, Statistics(*statistics)


class _Options(NamedTuple):
    relu: bool
    eps: float
    all_reduce: AllReduce | None


class _Vectors(NamedTuple):
    """Mean and biased variance [C], how many values they are of [1], and the scale and shift [C]
    that normalise by them."""

    mean: Tensor
    var: Tensor
    number: Tensor
    scale: Tensor
    shift: Tensor


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        origin: Tensor,
        real: Tensor,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        relu, eps, all_reduce = options
        rows = _rows(x), None if shortcut is None else _rows(shortcut), real
        # Detached, as code would be compiled for each size that a Parameter has.
        parameters = origin, weight.detach(), bias.detach(), eps
        done: list[Tensor] = []

        def find() -> _Vectors:
            found: _Vectors
            if all_reduce is None:
                y, found = _to_output(*rows, *parameters, relu)
                done.append(y)
            else:
                sums = torch.cat(_sums(rows[0], real, origin)).double()
                all_reduce(sums)
                found = _vectors(*sums[:-1].chunk(2), sums[-1:], *parameters)
            return found

        vectors = once(find)
        y = _clips(done[0] if done else _output(*rows, vectors, relu), x)
        # Where something was added, only the output tells which values were rectified.
        kept = y if shortcut is not None and relu else None
        ctx.save_for_backward(x, kept, weight, real, *vectors)
        ctx.options = options
        statistics = vectors.mean, vectors.var, vectors.number
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, weight, real, *vectors = ctx.saved_tensors
        relu, eps, all_reduce = ctx.options
        rows = _rows(grads[0]), _rows(x), None if y is None else _rows(y), real
        of_channels, options = _Vectors(*vectors), (eps, relu)
        into_plus = ctx.needs_input_grad[1]
        if all_reduce is None:
            own, of_x, of_plus = _to_gradients(*rows, of_channels, *options, into_plus)
        else:
            own = _gradient_sums(*rows, of_channels, *options)
            sums = own.to(torch.float64, copy=True)
            all_reduce(sums)
            of_x, of_plus = _gradients(*rows, sums, of_channels, *options, into_plus)
        of_plus = None if of_plus is None else _clips(of_plus, x)
        of_bias, of_weight = own.to(weight.dtype).unbind()
        return _clips(of_x, x), of_plus, of_weight, of_bias, None, None, None


# --- what is computed -----------------------------------------------------------------------------


def _sums_of(x: Tensor, real: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[C], [C] and [1]: sums around ``origin``, sums of squares around it, and how many values they
    are of."""
    centred = torch.where(real, x.to(origin.dtype) - origin, 0.0)
    number = real.sum().to(origin.dtype).view(1) * x.shape[1]
    # First within each frame: so they are more exact, and do not depend on the number of threads.
    return centred.sum(1).sum(0), centred.square().sum(1).sum(0), number


def _vectors_of(
    sums: Tensor,
    squares: Tensor,
    number: Tensor,
    origin: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> _Vectors:
    offset = sums / number
    mean = (origin + offset).to(origin.dtype)
    var = (squares / number - offset.square()).clamp(min=0.0).to(origin.dtype)
    scale = weight * (var + eps).rsqrt()
    return _Vectors(mean, var, number, scale, bias - mean * scale)


def _output_of(
    x: Tensor, shortcut: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool
) -> Tensor:
    y = x * vectors.scale + vectors.shift
    if shortcut is not None:
        y = y + shortcut
    if relu:
        y = y.clamp(min=0.0)
    return torch.where(real, y, 0.0).to(x.dtype)


def _before_relu(
    grad: Tensor, x: Tensor, y: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool
) -> Tensor:
    """The gradient of what is rectified, in the dtype of the vectors; in padded frames 0."""
    if relu:
        real = real & ((x * vectors.scale + vectors.shift if y is None else y) > 0)
    return torch.where(real, grad.to(vectors.scale.dtype), 0.0)


def _gradient_sums_of(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    vectors: _Vectors,
    eps: float,
    relu: bool,
) -> Tensor:
    """[2, C], the gradients of bias and weight: sums of the gradient of what is normalised, and of
    it times the normalised values."""
    grad = _before_relu(grad, x, y, real, vectors, relu)
    centred = x.to(vectors.mean.dtype) - vectors.mean
    of_weight = (grad * centred).sum(1).sum(0) * (vectors.var + eps).rsqrt()
    return torch.stack([grad.sum(1).sum(0), of_weight])


def _gradients_of(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    sums: Tensor,
    vectors: _Vectors,
    eps: float,
    relu: bool,
    into_plus: bool,
) -> tuple[Tensor, Tensor | None]:
    # weight / std * (g - mean(g) - normalised * mean(g * normalised)), by powers of x.
    of_all, of_normalised = (sums / vectors.number).to(vectors.scale.dtype).unbind()
    of_x = -vectors.scale * (vectors.var + eps).rsqrt() * of_normalised
    constant = -vectors.scale * of_all - of_x * vectors.mean
    dtype = grad.dtype
    grad = _before_relu(grad, x, y, real, vectors, relu)
    into_x = torch.where(real, grad * vectors.scale + x * of_x + constant, 0.0)
    return into_x.to(dtype), grad.to(dtype) if into_plus else None


# --- what is compiled -----------------------------------------------------------------------------

_sums = _loop(_sums_of)
_vectors = _loop(_vectors_of)
_output = _loop(_output_of)
_gradient_sums = _loop(_gradient_sums_of)
_gradients = _loop(_gradients_of)


# Where no process has to be asked in between, all of a pass in one call, which costs the host less.


@_loop
def _to_output(
    x: Tensor,
    shortcut: Tensor | None,
    real: Tensor,
    origin: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, _Vectors]:
    vectors = _vectors_of(*_sums_of(x, real, origin), origin, weight, bias, eps)
    return _output_of(x, shortcut, real, vectors, relu), vectors


@_loop
def _to_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    vectors: _Vectors,
    eps: float,
    relu: bool,
    into_plus: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    sums = _gradient_sums_of(grad, x, y, real, vectors, eps, relu)
    return sums, *_gradients_of(grad, x, y, real, sums, vectors, eps, relu, into_plus)


# --- rows and clips -------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[B, C, D, H, W] as [F, P, C]; a copy unless it is channels last."""
    batch, channels, depth, height, width = x.shape
    rows = x.permute(0, 2, 3, 4, 1).reshape(batch * depth, height * width, channels)
    # By .data it is no view, whose base the compiler would make code for.
    return rows.data


def _clips(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, depth, height, width = like.shape
    return rows.view(batch, depth, height, width, channels).permute(0, 4, 1, 2, 3)


def _real(valid: ValidFrames | None, x: Tensor) -> Tensor:
    """bool [F, 1, 1] on the device. Also of a batch without padding, so that loops are compiled
    once."""
    if valid is None:
        return torch.ones(x.shape[0] * x.shape[2], 1, 1, dtype=torch.bool, device=x.device)
    return valid.on_device.view(-1, 1, 1).data
