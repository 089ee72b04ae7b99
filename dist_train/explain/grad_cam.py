"""Grad-CAM (Selvaraju et al. 2017) of any network that keeps height and width in its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError

Score = Callable[[Tensor], Tensor]
#: Least height and width of a map, if a layer has one so large; else 2.
LEAST = 4
#: Height and width shrink alike in layers of convolutions, but for rounding.
ALIKE = 1.5


class _Layer(NamedTuple):
    """A layer whose output is [1, C, d, h, w], or [D, C, h, w] of a network of single frames.

    Attributes:
        call: its place among all calls of modules, from 1.
        size: h and w.
        is_even: along depth, height and width: whether a convolution or pooling before it had an
            even kernel, so that its cells are not centred on the first of the voxels that they
            stand for.
    """

    call: int
    size: tuple[int, int]
    is_even: tuple[bool, ...]


def grad_cam(model: nn.Module, clip: Tensor, score: Score) -> Tensor:
    """What of a clip speaks for a score: float32 [D, H, W], not negative.

    The layer is the last one that all information passes and whose output is at least 4 x 4 in
    height and width. Its channels are weighted by the mean of their gradients over the clip; in a
    network of single frames over each frame.

    Args:
        model: in eval mode. If it has a module ``spatial``, only layers in that are considered.
        clip: float32 [1, C, D, H, W], without padding.
        score: of the model's logits.

    Raises:
        ModelError: no layer near the end keeps height and width.
    """
    part = getattr(model, "spatial", model)
    for layer in _layers(model, part, clip):
        output, gradient = _gradient(model, part, clip, score, layer.call)
        if gradient is not None:
            return _enlarged(_weighted(output, gradient), clip, layer.is_even)
    raise ModelError(
        "no layer near the end of the model keeps height and width",
        where="grad-cam",
        fix="Take --method integrated-gradients, which suits any model.",
    )


def _layers(model: nn.Module, part: nn.Module, clip: Tensor) -> list[_Layer]:
    """The layers to try, the best first."""
    found, calls, even = list[_Layer](), 0, [False] * 3

    def note(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        for axis in range(3):
            if _along(module, "stride", axis) > 1 and _along(module, "kernel_size", axis) % 2 == 0:
                even[axis] = True
        if isinstance(output, Tensor) and _is_map(output, clip):
            found.append(_Layer(calls, (output.shape[-2], output.shape[-1]), tuple(even)))

    with torch.no_grad(), _hooked(part, note):
        model(clip, None)
    # Transformers have a map only in front, where they cut frames into patches.
    if not found or 2 * found[-1].call < calls:
        return []
    large = [layer for layer in found if min(layer.size) >= LEAST]
    return [*reversed(large), *(one for one in reversed(found) if min(one.size) in range(2, LEAST))]


def _gradient(
    model: nn.Module, part: nn.Module, clip: Tensor, score: Score, chosen: int
) -> tuple[Tensor, Tensor | None]:
    """The output of one call, and the score's gradient of it; None if something of the clip passes
    by it, as by the layers within a block with a shortcut."""
    calls, outputs = 0, list[Tensor]()

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != chosen:
            return output
        outputs.append(output.detach().requires_grad_())
        # A copy, because the next layer may work in place.
        return outputs[0].clone()

    clip = clip.detach().requires_grad_()
    with _hooked(part, cut):
        value = score(model(clip, None))
    by, gradient = torch.autograd.grad(value, (clip, outputs[0]), allow_unused=True)
    return outputs[0].detach(), gradient if by is None else None


@contextmanager
def _hooked(part: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    hooks = [module.register_forward_hook(hook) for module in part.modules()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _along(module: nn.Module, name: str, axis: int) -> int:
    """The stride or kernel of a layer along depth, height or width; 1 if it has none."""
    value = getattr(module, name, 1)
    values = value if isinstance(value, tuple) else (value,) * 3
    found = values[axis - 3] if len(values) >= 3 - axis else 1
    return found if isinstance(found, int) else 1


def _is_map(output: Tensor, clip: Tensor) -> bool:
    """Whether an output has the axes of the clip, and is not larger."""
    *_, depth, height, width = clip.shape
    if output.ndim == 4:
        is_of_clip = output.shape[0] == depth
    else:
        is_of_clip = output.ndim == 5 and output.shape[0] == 1 and output.shape[2] <= depth
    if not is_of_clip or min(output.shape[-2:]) == 0:
        return False
    shrunk = height / output.shape[-2], width / output.shape[-1]
    return min(shrunk) >= 1 and max(shrunk) <= ALIKE * min(shrunk)


def _weighted(output: Tensor, gradient: Tensor) -> Tensor:
    """The positive part of the weighted sum of channels, [d, h, w]."""
    axes = (2, 3, 4) if output.ndim == 5 else (2, 3)
    weights = gradient.float().mean(axes, keepdim=True)
    found = (weights * output.detach().float()).sum(1).relu()
    return found[0] if output.ndim == 5 else found


def _enlarged(found: Tensor, clip: Tensor, is_even: tuple[bool, ...]) -> Tensor:
    """A map [d, h, w] at the voxels of the clip, by linear interpolation between its cells.

    Cell j of a layer with stride s is centred on voxel s * j, as ``models.padding.strided`` says;
    after even kernels on the middle of voxels s * j to s * (j + 1) - 1.
    """
    for axis, (size, even) in enumerate(zip(clip.shape[2:], is_even, strict=True)):
        stride = 2 ** round(math.log2(size / found.shape[axis]))
        place = torch.arange(size, device=found.device) / stride
        if even:
            place = place - (0.5 - 0.5 / stride)
        place = place.clamp(0, found.shape[axis] - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=found.shape[axis] - 1)
        shape = [1, 1, 1]
        shape[axis] = size
        found = torch.lerp(
            found.index_select(axis, low),
            found.index_select(axis, high),
            (place - low).view(shape),
        )
    return found
