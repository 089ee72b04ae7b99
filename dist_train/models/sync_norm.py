"""Batch normalisation by statistics over the batches of several processes (Ioffe & Szegedy 2015).

torch.nn.SyncBatchNorm does this on CUDA alone. Here it is on any device, by two calls of a function
that sums a tensor over the processes: one in the forward pass, one in the backward pass.
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
    """Of all processes' values: float64 mean [C], biased variance [C], and their number []."""

    mean: Tensor
    var: Tensor
    number: Tensor


def shared_statistics(x: Tensor, like: Tensor, all_reduce: AllReduce) -> Statistics:
    """Statistics of each channel of [N, C, ...], over all processes.

    Args:
        like: a vector of the dtype to accumulate in, such as running means.
    """
    return once(lambda: _statistics(x.detach(), like, all_reduce))


@torch.no_grad()
def _statistics(x: Tensor, like: Tensor, all_reduce: AllReduce) -> Statistics:
    # The running statistics that it updates serve for their dtype only.
    scratch = torch.zeros_like(like), torch.ones_like(like)
    mean, var = (s.double() for s in torch.batch_norm_update_stats(x, *scratch, 1.0))
    # By a kernel: a number that is copied there would make the host wait for the device.
    count = mean.new_full((1,), x.numel() // x.shape[1])
    # Sums of squares around 0 cancel where the mean is large, but in float64 only far beyond what
    # x itself resolves.
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
    """Normalise [N, C, ...] by ``statistics``, of which ``x`` is a part, as its gradient knows.

    The gradients of weight and bias are those of this process's values, for the caller to sum or
    average as those of all parameters.
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
        x, weight, mean, var, count = ctx.saved_tensors
        (grad,) = grads
        # With statistics taken for constants; the sums of its other two gradients are what the
        # terms of mean and variance need. CUDA takes them from the saved ones, which CPUs ignore.
        saved = mean, (var + ctx.eps).rsqrt()
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, *saved, False, ctx.eps, [False, True, True]
        )
        sums = torch.cat([of_weight, of_bias]).double()
        ctx.all_reduce(sums)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None, None, None, None, None
        with_weight, with_bias = sums.chunk(2)
        inverse = (var.double() + ctx.eps).rsqrt()
        # weight / std * (grad - mean(grad) - normalised * mean(grad * normalised)), by powers of x.
        of_grad = weight.double() * inverse
        of_x = -of_grad * inverse * with_weight / count
        constant = -of_grad * with_bias / count - of_x * mean.double()
        shape = [1, -1] + [1] * (x.ndim - 2)
        of_grad, of_x, constant = (
            term.to(weight.dtype).view(shape) for term in (of_grad, of_x, constant)
        )
        of_input = (grad * of_grad).add_(x * of_x).add_(constant).to(x.dtype)
        return of_input, of_weight, of_bias, None, None, None, None, None
