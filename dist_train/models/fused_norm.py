"""Batch normalisation with the shortcut's sum and ReLU, in as few readings of memory as it takes.

``F.batch_norm``, ``+`` and ``F.relu`` each read and write all activations, and padding costs two
copies more. Here two loops run forward, for statistics and for the output, and two backward, for
sums and for gradients: on CPUs compiled_norm.py, on CUDA triton_norm.py. What a convolution gives
is read once in each, and only it is kept, beside what the next layers keep anyway (as in-place
activated batch normalisation has it, Rota Bulò et al. 2018, but without inverting).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.errors import ModelError
from dist_train.models.frames import ValidFrames
from dist_train.models.norm_loops import Loops, Vectors
from dist_train.models.passes import once
from dist_train.models.shared_norm import AllReduce, Statistics


def _loops(device: torch.device) -> Loops:
    # Triton is there with torch for CUDA alone.
    if device.type == "cuda":
        from dist_train.models import triton_norm

        return triton_norm
    from dist_train.models import compiled_norm

    return compiled_norm


def check_compiler(device: torch.device, setting: str) -> None:
    """Compile one of the loops.

    Raises:
        ModelError: what compiles them, as ``setting`` asks for, does not work on the device.
    """
    rows, channels = torch.ones(2, 3, 4, device=device), torch.ones(4, device=device)
    try:
        _loops(device).sums(rows, rows[:, :1, :1] > 0, channels)
    except Exception as error:
        what = "Triton" if device.type == "cuda" else "torch.compile"
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{what} does not work here: {type(error).__name__}: {reason}",
            where=setting,
            fix=f"Install a C++ compiler, and Triton for CUDA, or set {setting} to false",
        ) from None


def move_running_fused(
    mean: Tensor, var: Tensor, steps: Tensor, statistics: Statistics, momentum: float
) -> None:
    """``shared_norm.move_running``."""
    _loops(mean.device).move(mean, var, steps, statistics, momentum)


def fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    origin: Tensor,
    valid: ValidFrames | None,
    *,
    plus: Tensor | None,
    relu: bool,
    eps: float,
    all_reduce: AllReduce | None,
) -> tuple[Tensor, Statistics]:
    """Normalise the real frames of [B, C, D, H, W], add ``plus``, and rectify.

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
        x, plus, weight, bias, origin, _real(valid, x), options
    )
    return y, Statistics(*statistics)


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
        origin: Tensor,
        real: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        relu, eps, all_reduce = options
        rows = _rows(x), None if plus is None else _rows(plus), real
        # Detached, as code would be compiled for each size that a Parameter has.
        parameters = origin, weight.detach(), bias.detach()
        loops, done = _loops(x.device), list[Tensor]()

        def find() -> Vectors:
            if all_reduce is None:
                y, found = loops.to_output(*rows, *parameters, eps, relu)
                done.append(y)
                return found
            sums = loops.sums(rows[0], real, origin).double()
            all_reduce(sums)
            return loops.vectors(sums, *parameters, eps)

        vectors = once(find)
        y = _clips(done[0] if done else loops.output(*rows, vectors, relu), x)
        # Where something was added, only the output tells which values were rectified.
        kept = y if plus is not None and relu else None
        ctx.save_for_backward(x, kept, weight, real, *vectors)
        ctx.options = options
        statistics = vectors.mean, vectors.var, vectors.number
        ctx.mark_non_differentiable(*statistics)
        # Else they come as zeros, each by a kernel.
        ctx.set_materialize_grads(False)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, weight, real, *vectors = ctx.saved_tensors
        relu, eps, all_reduce = ctx.options
        rows = _rows(grads[0]), _rows(x), None if y is None else _rows(y), real
        of_channels, options = Vectors(*vectors), (eps, relu)
        loops, into_plus = _loops(x.device), ctx.needs_input_grad[1]
        if all_reduce is None:
            own, of_x, of_plus = loops.to_gradients(*rows, of_channels, *options, into_plus)
        else:
            own = loops.gradient_sums(*rows, of_channels, *options)
            sums = own.to(torch.float64, copy=True)
            all_reduce(sums)
            of_x, of_plus = loops.gradients(*rows, sums, of_channels, *options, into_plus)
        of_plus = None if of_plus is None else _clips(of_plus, x)
        of_bias, of_weight = own.to(weight.dtype).unbind()
        return _clips(of_x, x), of_plus, of_weight, of_bias, None, None, None


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


def _real(valid: ValidFrames | None, x: Tensor) -> Tensor | None:
    """bool [F, 1, 1] on the device, or None for all."""
    if valid is None:
        if x.is_cuda:
            return None
        # torch.compile would take half a minute more for code that knows that there is no padding.
        return torch.ones(x.shape[0] * x.shape[2], 1, 1, dtype=torch.bool, device=x.device)
    return valid.on_device.view(-1, 1, 1).data
