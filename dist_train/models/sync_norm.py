"""Batch normalisation with statistics over the batches of all processes (Ioffe & Szegedy 2015).

torch.nn.SyncBatchNorm works on CUDA only; this works on any device. It calls an all-reduce once in
the forward pass and once in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.models.recompute_once import once

#: Sums a float64 tensor over the processes, in place.
AllReduce = Callable[[Tensor], None]


class Statistics(NamedTuple):
    """Mean [C], biased variance [C] and count [] of the values of all processes."""

    mean: Tensor
    var: Tensor
    number: Tensor


def shared_statistics(x: Tensor, like: Tensor, all_reduce: AllReduce) -> Statistics:
    """Statistics of each channel of [N, C, ...] over all processes, in float64.

    ``like`` is a vector [C] in the dtype to accumulate in, such as the running mean.
    """
    return once(lambda: _statistics(x.detach(), like, all_reduce))


@torch.no_grad()
def _statistics(x: Tensor, like: Tensor, all_reduce: AllReduce) -> Statistics:
    # The function updates these running statistics; only their dtype matters.
    scratch = torch.zeros_like(like), torch.ones_like(like)
    mean, var = (s.double() for s in torch.batch_norm_update_stats(x, *scratch, 1.0))
    # Filled by a kernel: copying a number to the device would make the host wait.
    count = mean.new_full((1,), x.numel() // x.shape[1])
    # Sums of squares around 0 cancel for large means, but in float64 the loss is far below the
    # resolution of x.
    sums = torch.cat([count * mean, count * (var + mean.square()), count])
    all_reduce(sums)
    channels = x.shape[1]
    count = sums[-1]
    mean, square = sums[:channels] / count, sums[channels:-1] / count
    return Statistics(mean, (square - mean.square()).clamp(min=0.0), count)


def shared_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics,
    eps: float,
    all_reduce: AllReduce,
) -> Tensor:
    """Normalise [N, C, ...] by ``statistics``, which include ``x``.

    The gradient of ``x`` includes its contribution to the statistics. The gradients of weight and
    bias come from this process's values only; the caller reduces them like other gradients.
    """
    output: Tensor = _SharedBatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, *statistics, eps, all_reduce
    )
    return output


class _SharedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        all_reduce: AllReduce,
    ) -> Tensor:
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.all_reduce = eps, all_reduce
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight, mean, var, count), (grad,) = ctx.saved_tensors, grads
        # Gradients of weight and bias, with the statistics as constants. Summed over processes they
        # also give the terms of mean and variance. CUDA reads the saved ones, CPUs the running.
        saved = mean, (var + ctx.eps).rsqrt()
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, *saved, False, ctx.eps, [False, True, True]
        )
        sums = torch.cat([grad_weight, grad_bias]).double()
        ctx.all_reduce(sums)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, *[None] * 5
        sum_weight, sum_bias = sums.chunk(2)
        inverse = (var.double() + ctx.eps).rsqrt()
        # weight / std * (grad - mean(grad) - normalised * mean(grad * normalised)), by powers of x.
        grad_factor = weight.double() * inverse
        x_factor = -grad_factor * inverse * sum_weight / count
        constant = -grad_factor * sum_bias / count - x_factor * mean.double()
        shape = [1, -1] + [1] * (x.ndim - 2)
        grad_factor, x_factor, constant = (
            term.to(weight.dtype).view(shape) for term in (grad_factor, x_factor, constant)
        )
        grad_x = (grad * grad_factor).add_(x * x_factor).add_(constant).to(x.dtype)
        return grad_x, grad_weight, grad_bias, *[None] * 5
