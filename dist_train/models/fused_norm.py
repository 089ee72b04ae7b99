"""Batch normalisation with the shortcut's sum and ReLU, in as few readings of memory as it takes.

``F.batch_norm``, ``+`` and ``F.relu`` each read and write all activations, and padding costs two
copies more. Here ``torch.compile`` makes one loop of each of four functions: for statistics, for
the output, for the sums of the backward pass, and for its gradients. What a convolution gives is
read twice forward and twice backward, and only it is kept, beside what the next layers keep anyway
(as in-place activated batch normalisation has it, Rota Bulò et al. 2018, but without inverting).

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
from dist_train.models.frames import ValidFrames
from dist_train.models.passes import once
from dist_train.models.shared_norm import AllReduce, Statistics

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
    """Compile one of the loops, which is used later.

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


def fused_statistics(
    x: Tensor, origin: Tensor, valid: ValidFrames | None, all_reduce: AllReduce | None
) -> Statistics:
    """Statistics of each channel of the real frames of [B, C, D, H, W], here or over all processes.

    Args:
        origin: [C], in the dtype to accumulate in: values near the means, such as running ones,
            around which sums of squares do not cancel (Chan, Golub & LeVeque 1983). Where
            processes share statistics it must be the same in all.
    """
    return once(lambda: _statistics(x.detach(), origin.clone(), valid, all_reduce))


@torch.no_grad()
def _statistics(
    x: Tensor, origin: Tensor, valid: ValidFrames | None, all_reduce: AllReduce | None
) -> Statistics:
    sums = _sums(_rows(x), _real(valid, x), origin)
    if all_reduce is not None:
        sums = sums.double()
        all_reduce(sums)
    number = sums[-1]
    offset, square = (sums[:-1] / number).chunk(2)
    var = (square - offset.square()).clamp(min=0.0)
    return Statistics((origin + offset).to(origin.dtype), var.to(origin.dtype), number)


def fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics,
    valid: ValidFrames | None,
    *,
    plus: Tensor | None,
    relu: bool,
    eps: float,
    all_reduce: AllReduce | None,
) -> Tensor:
    """Normalise the real frames of [B, C, D, H, W] by ``statistics``, of which they are a part, add
    ``plus``, and rectify; padded frames become zero. In the dtype of ``x``, channels last.

    The gradients of weight and bias are those of this process's values.
    """
    options = _Options(relu=relu, eps=eps, all_reduce=all_reduce)
    output: Tensor = _FusedNorm.apply(  # type: ignore[no-untyped-call]
        x, plus, weight, bias, *statistics, _real(valid, x), options
    )
    return output


class _Options(NamedTuple):
    relu: bool
    eps: float
    all_reduce: AllReduce | None


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plus: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        number: Tensor,
        real: Tensor,
        options: _Options,
    ) -> Tensor:
        scale = weight * (var + options.eps).rsqrt()
        shift = bias - mean * scale
        added = None if plus is None else _rows(plus)
        y = _clips(_output(_rows(x), added, real, scale, shift, options.relu), x)
        # Where something was added, only the output tells which values were rectified.
        kept = y if plus is not None and options.relu else None
        ctx.save_for_backward(x, kept, weight, scale, shift, mean, var, number, real)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, y, weight, scale, shift, mean, var, number, real = ctx.saved_tensors
        options: _Options = ctx.options
        rows = _rows(grad), _rows(x), None if y is None else _rows(y), real
        inverse = (var + options.eps).rsqrt()
        own = _gradient_sums(*rows, scale, shift, mean, options.relu)
        of_bias, of_centred = own.unbind()
        of_weight = of_centred * inverse
        sums = own
        if options.all_reduce is not None:
            sums = own.to(torch.float64, copy=True)
            options.all_reduce(sums)
        # weight / std * (g - mean(g) - normalised * mean(g * normalised)), by powers of x.
        of_all, of_all_centred = (sums / number).to(own.dtype).unbind()
        of_x = -scale * inverse.square() * of_all_centred
        constant = -scale * of_all - of_x * mean
        into_x, into_plus = _gradients(
            *rows, scale, shift, of_x, constant, options.relu, ctx.needs_input_grad[1]
        )
        return (
            _clips(into_x, x),
            _clips(into_plus, x) if into_plus is not None else None,
            of_weight.to(weight.dtype),
            of_bias.to(weight.dtype),
            *(None,) * 5,
        )


# --- the loops ------------------------------------------------------------------------------------


@_loop
def _sums(x: Tensor, real: Tensor, origin: Tensor) -> Tensor:
    """[2 C + 1]: sums around ``origin``, sums of squares around it, and how many values they are
    of."""
    centred = torch.where(real, x.to(origin.dtype) - origin, 0.0)
    number = real.sum().to(origin.dtype).view(1) * x.shape[1]
    # First within each frame: so they are more exact, and do not depend on the number of threads.
    sums = centred.sum(1).sum(0), centred.square().sum(1).sum(0)
    return torch.cat([*sums, number])


@_loop
def _output(
    x: Tensor,
    plus: Tensor | None,
    real: Tensor,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
) -> Tensor:
    y = x * scale + shift
    if plus is not None:
        y = y + plus
    if relu:
        y = y.clamp(min=0.0)
    return torch.where(real, y, 0.0).to(x.dtype)


@_loop
def _gradient_sums(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    relu: bool,
) -> Tensor:
    """[2, C]: sums of the gradient of what is normalised, and of it times the centred values."""
    grad = _before_relu(grad, x, y, real, scale, shift, relu)
    centred = x.to(mean.dtype) - mean
    return torch.stack([grad.sum(1).sum(0), (grad * centred).sum(1).sum(0)])


@_loop
def _gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    scale: Tensor,
    shift: Tensor,
    of_x: Tensor,
    constant: Tensor,
    relu: bool,
    into_plus: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = grad.dtype
    grad = _before_relu(grad, x, y, real, scale, shift, relu)
    into_x = torch.where(real, grad * scale + x * of_x + constant, 0.0)
    return into_x.to(dtype), grad.to(dtype) if into_plus else None


def _before_relu(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
) -> Tensor:
    """The gradient of what is rectified, in the dtype of ``scale``; in padded frames 0."""
    if relu:
        real = real & ((x * scale + shift if y is None else y) > 0)
    return torch.where(real, grad.to(scale.dtype), 0.0)


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
