"""Losses by name, or by import path: logits and labels of a micro-batch -> its mean loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train import extensions
from dist_train.config import LossSettings
from dist_train.errors import ConfigError

#: Takes logits and labels, float32 [B] each, and returns the mean loss over the clips, a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]

#: The functions that ``loss.name`` can name; ``loss.args`` are their further arguments.
LOSSES: dict[str, Callable[..., Tensor]] = {"bce": binary_cross_entropy_with_logits}


def make_loss(settings: LossSettings, device: torch.device | None = None) -> Loss:
    """Return the loss that the settings name.

    Args:
        device: where it will compute, for tensors of its own; None is the host.

    Raises:
        ConfigError: there is no such loss, it does not take these arguments, or it is not a loss.
    """
    name, device = settings.name, device or torch.device("cpu")
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
    _check(name, loss, device)
    return loss


def _check(name: str, loss: Loss, device: torch.device) -> None:
    """Raise unless the loss of a small batch is a scalar with a gradient."""
    logits = torch.zeros(4, device=device, requires_grad=True)
    value = loss(logits, torch.tensor([0.0, 1.0, 0.0, 0.0], device=device))
    if not (isinstance(value, Tensor) and value.shape == () and value.requires_grad):
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"{name} is no loss: of 4 clips it gives {given}",
            where="loss.name",
            fix="Give the mean over the clips, a scalar with a gradient.",
        )
