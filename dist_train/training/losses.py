"""Losses by name, or by import path: logits and labels of a micro-batch -> its mean loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
)

from dist_train import extensions
from dist_train.config import LossSettings
from dist_train.errors import ConfigError
from dist_train.targets import NATURAL_LOSS, Kind, Target
from dist_train.training.focal import categorical_focal, focal
from dist_train.training.label_forms import as_scores

#: Takes logits and labels, float32, and returns the mean loss over the clips, a scalar. Logits are
#: [B] of a model with one output, else [B, outputs]. Labels are classes [B], or ``as_scores``.
Loss = Callable[..., Tensor]


def categorical(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of logits [B, K] with classes [B], or with probabilities [B, K]."""
    return cross_entropy(logits, labels.long() if labels.ndim == 1 else labels, reduction=reduction)


def cumulative(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross entropy of the logits of y > k, [B, K - 1], with classes [B], or with the
    probabilities of y > k (Frank and Hall 2001; Niu et al. 2016)."""
    labels = as_scores(labels, "ordinal", logits)
    return binary_cross_entropy_with_logits(logits, labels, reduction=reduction)


#: The functions that ``loss.name`` can name; ``loss.args`` are their further arguments. A function
#: that takes ``reduction`` gives with "none" the loss of each clip, [B], or output, [B, outputs].
LOSSES: dict[str, Callable[..., Tensor]] = {
    "bce": binary_cross_entropy_with_logits,
    "ce": categorical,
    "focal": focal,
    "ordinal": cumulative,
    "huber": huber_loss,
    "mse": mse_loss,
    "mae": l1_loss,
}
#: The kinds of target that a loss is for. Others, from outside, are for any.
KINDS: dict[Callable[..., Tensor], tuple[Kind, ...]] = {
    binary_cross_entropy_with_logits: ("binary", "multilabel"),
    categorical: ("multiclass",),
    focal: ("binary", "multilabel", "multiclass"),
    cumulative: ("ordinal",),
    huber_loss: ("regression",),
    mse_loss: ("regression",),
    l1_loss: ("regression",),
}


def make_loss(
    settings: LossSettings,
    device: torch.device | None = None,
    target: Target | None = None,
    *,
    each: bool = False,
) -> Loss:
    """Return the loss that ``name`` and ``args`` of the settings say, which validation uses;
    ``make_training_loss`` heeds the other settings.

    Args:
        device: where it will compute, for tensors of its own; None is the host.
        target: what the model predicts; None are two classes.
        each: give the loss of each clip, [B], or output, [B, outputs], instead of the mean.

    Raises:
        ConfigError: there is no such loss, it is for another kind of target, it does not take these
            arguments, or it is not a loss.
    """
    device, target = device or torch.device("cpu"), target or Target()
    name = NATURAL_LOSS[target.kind] if settings.name == "auto" else settings.name
    found = _found(name, target)
    is_class = isinstance(found, type)
    args = dict(settings.args)
    if each:
        if "reduction" not in inspect.signature(found).parameters:
            raise ConfigError(
                f"{name} gives the mean over the clips only, so clips cannot have weights",
                where="loss.name",
                fix="Let it take reduction, as torch's losses do; or leave out loss.class_weights "
                "and loss.sureness.",
            )
        args["reduction"] = "none"
    inputs = () if is_class else (None, None)
    try:
        if each and "reduction" in settings.args:
            raise TypeError("reduction is not free: clips have weights")
        inspect.signature(found).bind(*inputs, **args)
        loss: Loss = found(**args) if is_class else partial(found, **args)
    except TypeError as error:
        raise ConfigError(f"{name} does not take these ({error})", where="loss.args") from None
    if isinstance(loss, nn.Module):
        if any(True for _ in loss.parameters()):
            raise ConfigError(
                f"{name} has weights of its own, which nothing would train", where="loss.name"
            )
        loss.to(device)
    _check(name, loss, device, target, each)
    return loss


def _found(name: str, target: Target) -> Any:
    if extensions.is_import_path(name):
        found = extensions.load(name, "loss.name")
    elif name in LOSSES:
        found = LOSSES[name]
    else:
        raise ConfigError(
            f"there is no loss {name!r}",
            where="loss.name",
            fix=f"There are: auto, {', '.join(LOSSES)}.",
        )
    is_class = isinstance(found, type)
    if not (issubclass(found, nn.Module) if is_class else isinstance(found, FunctionType)):
        raise ConfigError(
            f"{name} is no loss",
            where="loss.name",
            fix="Name a subclass of torch.nn.Module, or a function of logits and labels.",
        )
    if target.kind not in KINDS.get(found, (target.kind,)):
        fitting = [n for n, known in LOSSES.items() if target.kind in KINDS.get(known, ())]
        raise ConfigError(
            f"{name} is a loss for {' and '.join(KINDS[found])} targets, and this one is "
            f"{target.kind}",
            where="loss.name",
            fix=f"Use one of: auto, {', '.join(fitting)}.",
        )
    if found is focal and target.kind == "multiclass":
        return categorical_focal
    return found


def _check(name: str, loss: Loss, device: torch.device, target: Target, each: bool) -> None:
    """Raise unless the loss of a small batch is a scalar with a gradient, or one for each clip."""
    logits = torch.zeros(4, *target.logit_shape, device=device, requires_grad=True)
    labels = torch.zeros(4, *target.label_shape, device=device)
    labels[1] = 1
    value = loss(logits, labels)
    fits = isinstance(value, Tensor) and value.requires_grad
    if not (fits and (value.shape[:1] == (4,) if each else value.shape == ())):
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"{name} is no loss: of 4 clips it gives {given}",
            where="loss.name",
            fix='By reduction="none" give the loss of each clip, [B].'
            if each
            else "Give the mean over the clips, a scalar with a gradient.",
        )
