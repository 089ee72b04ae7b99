"""Counts the bytes that live during a step, as ``activation_memory`` does."""

from __future__ import annotations

from torch import Tensor, nn

from dist_train.models.activation_budget import _drop_gradient, _Meter


def peak_of_step(model: nn.Module, clips: Tensor, frames: Tensor | None = None) -> int:
    """Peak bytes of a forward and backward pass, without weights and their gradients."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with _Meter() as meter:
        meter.note(clips)
        model(clips, frames).sum().backward()
    return meter.peak
