"""The loops of fused normalisation by ``torch.compile``, for CPUs: see norm_loops.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from dist_train.models.norm_loops import Vectors
from dist_train.models.shared_norm import move_running

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
) -> Vectors:
    offset = sums / number
    mean = (origin + offset).to(origin.dtype)
    var = (squares / number - offset.square()).clamp(min=0.0).to(origin.dtype)
    scale = weight * (var + eps).rsqrt()
    return Vectors(mean, var, number, scale, bias - mean * scale)


def _output_of(
    x: Tensor, plus: Tensor | None, real: Tensor, vectors: Vectors, relu: bool
) -> Tensor:
    y = x * vectors.scale + vectors.shift
    if plus is not None:
        y = y + plus
    if relu:
        y = y.clamp(min=0.0)
    return torch.where(real, y, 0.0).to(x.dtype)


def _before_relu(
    grad: Tensor, x: Tensor, y: Tensor | None, real: Tensor, vectors: Vectors, relu: bool
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
    vectors: Vectors,
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
    vectors: Vectors,
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
output = _loop(_output_of)
gradient_sums = _loop(_gradient_sums_of)
gradients = _loop(_gradients_of)


def sums(x: Tensor, real: Tensor | None, origin: Tensor) -> Tensor:
    return torch.cat(_sums(x, real, origin))


def vectors(sums: Tensor, origin: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Vectors:
    found: Vectors = _vectors(*sums[:-1].chunk(2), sums[-1:], origin, weight, bias, eps)
    return found


# All of a pass in one call costs the host less.


@_loop
def to_output(
    x: Tensor,
    plus: Tensor | None,
    real: Tensor,
    origin: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Vectors]:
    vectors = _vectors_of(*_sums_of(x, real, origin), origin, weight, bias, eps)
    return _output_of(x, plus, real, vectors, relu), vectors


@_loop
def to_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    real: Tensor,
    vectors: Vectors,
    eps: float,
    relu: bool,
    into_plus: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    sums = _gradient_sums_of(grad, x, y, real, vectors, eps, relu)
    return sums, *_gradients_of(grad, x, y, real, sums, vectors, eps, relu, into_plus)


move = move_running
