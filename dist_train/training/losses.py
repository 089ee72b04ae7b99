"""Losses by name, or by import path: logits and labels of a micro-batch -> its mean loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, huber_loss

from dist_train import extensions
from dist_train.config import LossSettings
from dist_train.errors import ConfigError
from dist_train.targets import NATURAL_LOSS, Target

#: Takes logits and labels, float32 [B] each or as ``Target`` says, and returns the mean loss over
#: the clips, a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


def class_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, K] and class codes [B]."""
    return cross_entropy(logits, labels.long())


def cumulative_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean binary cross entropy of "the class is above k" for logits [B, K-1] and class codes
    [B] (Niu et al., "Ordinal regression with multiple output CNN for age estimation", 2016)."""
    above = labels[:, None] > torch.arange(logits.shape[1], device=logits.device)
    return binary_cross_entropy_with_logits(logits, above.to(logits.dtype))


#: The functions that ``loss.name`` can name; ``loss.args`` are their further arguments.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "bce": binary_cross_entropy_with_logits,
    "ce": class_cross_entropy,
    "ordinal": cumulative_cross_entropy,
    "huber": huber_loss,
}


def make_loss(
    settings: LossSettings, device: torch.device | None = None, target: Target | None = None
) -> Loss:
    """Return the loss that the settings name.

    Args:
        device: where it will compute, for tensors of its own; None is the host.
        target: what the run predicts; None is a binary one.

    Raises:
        ConfigError: there is no such loss, it does not take these arguments, or it is not a loss,
            or not one of this kind of target.
    """
    target, device = target or Target(), device or torch.device("cpu")
    name = NATURAL_LOSS[target.kind] if settings.name == "auto" else settings.name
    if name in LOSSES and name != NATURAL_LOSS[target.kind] and name in NATURAL_LOSS.values():
        raise ConfigError(
            f"{name} is no loss of kind {target.kind}",
            where="loss.name",
            fix=f"That kind has {NATURAL_LOSS[target.kind]}; leave loss.name out.",
        )
    if extensions.is_import_path(name):
        found = extensions.load(name, "loss.name")
    elif name in LOSSES:
        found = LOSSES[name]
    else:
        raise ConfigError(
            f"there is no loss {name!r}", where="loss.name", fix=f"There are: {', '.join(LOSSES)}."
        )
    is_class = isinstance(found, type)
    if not (issubclass(found, nn.Module) if is_class else isinstance(found, FunctionType)):
        raise ConfigError(
            f"{name} is no loss",
            where="loss.name",
            fix="Name a subclass of torch.nn.Module, or a function of logits and labels.",
        )
    inputs = () if is_class else (None, None)
    try:
        inspect.signature(found).bind(*inputs, **settings.args)
        loss: Loss = found(**settings.args) if is_class else partial(found, **settings.args)
    except TypeError as error:
        raise ConfigError(f"{name} does not take these ({error})", where="loss.args") from None
    if isinstance(loss, nn.Module):
        if any(True for _ in loss.parameters()):
            raise ConfigError(
                f"{name} has weights of its own, which nothing would train", where="loss.name"
            )
        loss.to(device)
    _check(name, loss, device, target)
    return loss


def _check(name: str, loss: Loss, device: torch.device, target: Target) -> None:
    """Raise unless the loss of a small batch is a scalar with a gradient."""
    logits = torch.zeros(4, *target.logit_shape, device=device, requires_grad=True)
    labels = torch.zeros(4, *target.label_shape, device=device)
    labels[1] = 1.0
    value = loss(logits, labels)
    if not (isinstance(value, Tensor) and value.shape == () and value.requires_grad):
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"{name} is no loss: of 4 clips it gives {given}",
            where="loss.name",
            fix="Give the mean over the clips, a scalar with a gradient.",
        )
