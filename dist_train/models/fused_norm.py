"""Batch normalisation fused with the shortcut's sum and the ReLU, to read memory less often.

``F.batch_norm``, ``+`` and ``F.relu`` each read and write all activations, and padding costs two
more copies. ``torch.compile`` makes two loops forward (statistics, output) and two backward (sums,
gradients). Each reads the convolution's output once, and only that is kept for the backward pass.

The loops work on rows [F, P, C]: B * D frames, H * W pixels, C channels. That is the memory order
of a batch [B, C, D, H, W] in ``channels_last_3d``.
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

#: Keeps the compiler from storing the summands, as large as the activations, between two sums.
ONE_LOOP: dict[str, Any] = {"realize_reads_threshold": 100, "realize_opcount_threshold": 1000}


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call, as compiling takes seconds and few runs need it.

    Called by another loop it becomes a part of that one.
    """

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True, options=ONE_LOOP)

    @wraps(function)
    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments)
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
        origin: [C], in the dtype to accumulate in: values near the means, such as the running
            means. Sums of squares around them do not cancel (Chan, Golub & LeVeque 1983). It must
            be equal in all processes that share statistics.
        all_reduce: if set, statistics cover all processes. Gradients of weight and bias come from
            this process's values only.

    Returns:
        (output in the dtype of ``x``, channels last, zero in padded frames; the statistics).
    """
    y, *statistics = _FusedNorm.apply(  # type: ignore[no-untyped-call]
        x, shortcut, weight, bias, origin, _real(valid, x), relu, eps, all_reduce
    )
    return y, Statistics(*statistics)


class _Vectors(NamedTuple):
    """Statistics of a batch: mean [C], biased variance [C], number of values [1]. And what
    normalises: scale [C], shift [C], inverse standard deviation [C]."""

    mean: Tensor
    var: Tensor
    number: Tensor
    scale: Tensor
    shift: Tensor
    inverse: Tensor


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
        relu: bool,
        eps: float,
        all_reduce: AllReduce | None,
    ) -> tuple[Tensor, ...]:
        rows = _rows(x), None if shortcut is None else _rows(shortcut), real
        # Detached, as the compiler would make code for each size of a Parameter.
        parameters = origin, weight.detach(), bias.detach(), eps
        outputs: list[Tensor] = []

        def compute() -> _Vectors:
            vectors: _Vectors
            if all_reduce is None:
                y, vectors = _to_output(*rows, *parameters, relu)
                outputs.append(y)
            else:
                sums = torch.cat(_sums(rows[0], real, origin)).double()
                all_reduce(sums)
                vectors = _vectors(*sums[:-1].chunk(2), sums[-1:], *parameters)
            return vectors

        vectors = once(compute)
        y = _clips(outputs[0] if outputs else _output(*rows, vectors, relu), x)
        # With a shortcut, only the output shows which values the ReLU set to zero.
        kept = y if shortcut is not None and relu else None
        ctx.save_for_backward(x, kept, weight, real, *vectors)
        ctx.relu, ctx.all_reduce = relu, all_reduce
        statistics = vectors.mean, vectors.var, vectors.number
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, weight, real, *vectors = ctx.saved_tensors
        rows = _rows(grads[0]), _rows(x), None if y is None else _rows(y), real
        how = _Vectors(*vectors), ctx.relu
        with_shortcut = ctx.needs_input_grad[1]
        if ctx.all_reduce is None:
            own_sums, grad_x, grad_shortcut = _to_gradients(*rows, *how, with_shortcut)
        else:
            own_sums = _gradient_sums(*rows, *how)
            sums = own_sums.to(torch.float64, copy=True)
            ctx.all_reduce(sums)
            grad_x, grad_shortcut = _gradients(*rows, *how, with_shortcut, sums)
        grad_shortcut = None if grad_shortcut is None else _clips(grad_shortcut, x)
        grad_bias, grad_weight = own_sums.to(weight.dtype).unbind()
        return _clips(grad_x, x), grad_shortcut, grad_weight, grad_bias, *[None] * 5


# --- the loops ------------------------------------------------------------------------------------


@_loop
def _sums(x: Tensor, real: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [C] and sums of squares [C] around ``origin``, and the number of values [1]."""
    centred = torch.where(real, x.to(origin.dtype) - origin, 0.0)
    number = real.sum().to(origin.dtype).view(1) * x.shape[1]
    # Within each frame first: more exact, and independent of the number of threads.
    return centred.sum(1).sum(0), centred.square().sum(1).sum(0), number


@_loop
def _vectors(
    sums: Tensor, squares: Tensor, number: Tensor,
    origin: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> _Vectors:  # fmt: skip
    offset = sums / number
    mean = (origin + offset).to(origin.dtype)
    var = (squares / number - offset.square()).clamp(min=0.0).to(origin.dtype)
    inverse = (var + eps).rsqrt()
    scale = weight * inverse
    return _Vectors(mean, var, number, scale, bias - mean * scale, inverse)


@_loop
def _output(
    x: Tensor, shortcut: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool
) -> Tensor:
    y = x * vectors.scale + vectors.shift
    if shortcut is not None:
        y = y + shortcut
    if relu:
        y = y.clamp(min=0.0)
    return torch.where(real, y, 0.0).to(x.dtype)


@_loop
def _to_output(
    x: Tensor, shortcut: Tensor | None, real: Tensor,
    origin: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool,
) -> tuple[Tensor, _Vectors]:  # fmt: skip
    """One call without an all-reduce in between, which costs the host less."""
    vectors = _vectors(*_sums(x, real, origin), origin, weight, bias, eps)
    return _output(x, shortcut, real, vectors, relu), vectors


def _before_relu(
    grad: Tensor, x: Tensor, y: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool
) -> Tensor:
    """The gradient before the ReLU, in the dtype of the vectors; 0 in padded frames."""
    if relu:
        real = real & ((x * vectors.scale + vectors.shift if y is None else y) > 0)
    return torch.where(real, grad.to(vectors.scale.dtype), 0.0)


@_loop
def _gradient_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool
) -> Tensor:
    """The gradients of bias and weight: [2, C]."""
    grad = _before_relu(grad, x, y, real, vectors, relu)
    centred = x.to(vectors.mean.dtype) - vectors.mean
    grad_weight = (grad * centred).sum(1).sum(0) * vectors.inverse
    return torch.stack([grad.sum(1).sum(0), grad_weight])


@_loop
def _gradients(
    grad: Tensor, x: Tensor, y: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool,
    with_shortcut: bool, sums: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of the input and of the shortcut, from the sums of all processes."""
    # weight / std * (g - mean(g) - normalised * mean(g * normalised)), by powers of x.
    mean_grad, mean_product = (sums / vectors.number).to(vectors.scale.dtype).unbind()
    x_factor = -vectors.scale * vectors.inverse * mean_product
    constant = -vectors.scale * mean_grad - x_factor * vectors.mean
    dtype = grad.dtype
    grad = _before_relu(grad, x, y, real, vectors, relu)
    grad_x = torch.where(real, grad * vectors.scale + x * x_factor + constant, 0.0)
    return grad_x.to(dtype), grad.to(dtype) if with_shortcut else None


@_loop
def _to_gradients(
    grad: Tensor, x: Tensor, y: Tensor | None, real: Tensor, vectors: _Vectors, relu: bool,
    with_shortcut: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """One call without an all-reduce in between."""
    sums = _gradient_sums(grad, x, y, real, vectors, relu)
    return sums, *_gradients(grad, x, y, real, vectors, relu, with_shortcut, sums)


# --- rows and clips -------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[B, C, D, H, W] as [F, P, C]; a copy unless it is channels last."""
    # .data drops the view's base, for which the compiler would make other code.
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1).data


def _clips(rows: Tensor, like: Tensor) -> Tensor:
    """[F, P, C] as [B, C, D, H, W], of the shape of ``like``."""
    batch, channels, depth, height, width = like.shape
    return rows.view(batch, depth, height, width, channels).permute(0, 4, 1, 2, 3)


def _real(valid: ValidFrames | None, x: Tensor) -> Tensor:
    """bool [F, 1, 1] on the device. A batch without padding gets one too, so that the loops are
    compiled once."""
    if valid is None:
        return torch.ones(x.shape[0] * x.shape[2], 1, 1, dtype=torch.bool, device=x.device)
    return valid.on_device.view(-1, 1, 1).data
