"""The loss of training: the named one with class weights, smoothing, logit adjustment and a
teacher; docs/losses.md has the formulas."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import LossSettings
from dist_train.errors import ConfigError
from dist_train.targets import Target
from dist_train.training.class_rates import ClassRates, Floats
from dist_train.training.label_forms import as_scores, class_shares
from dist_train.training.losses import Loss, categorical, make_loss

#: Settings that validation does not know.
OF_TRAINING = ("class_weights", "smoothing", "logit_adjustment", "sureness", "distill")


def make_training_loss(
    settings: LossSettings,
    device: torch.device,
    target: Target | None = None,
    rates: ClassRates | None = None,
) -> Loss:
    """Return the loss that the settings describe: that of ``make_loss`` where they say no more.

    It takes logits, labels (classes, or scores of ``label_forms``) and, as far as the settings ask
    for them, ``clip_weights`` (float32 [B]) and ``teacher`` (scores).

    Raises:
        ConfigError: as ``make_loss``; or a setting does not fit the kind of target.
    """
    target = target or Target()
    default = LossSettings()
    if all(getattr(settings, name) == getattr(default, name) for name in OF_TRAINING):
        return make_loss(settings, device, target)
    return TrainingLoss(settings, device, target, rates)


class TrainingLoss:
    """See ``make_training_loss``."""

    def __init__(
        self,
        settings: LossSettings,
        device: torch.device,
        target: Target,
        rates: ClassRates | None,
    ) -> None:
        _check(settings, target, rates)
        self._kind, self._smoothing, self._distill = target.kind, settings.smoothing, None
        self._class_weights = self._shift = None
        self._has_weights = settings.class_weights is not None or settings.sureness != "none"
        self._loss = make_loss(settings, device, target, each=self._has_weights)
        if settings.class_weights is not None:
            weights = class_weights(settings, target, rates)
            self._class_weights = torch.tensor(weights, dtype=torch.float32, device=device)
        if settings.logit_adjustment is not None:
            assert rates is not None
            shift = torch.tensor(logit_shift(settings, rates), dtype=torch.float32, device=device)
            self._shift = shift[1] - shift[0] if target.kind == "binary" else shift
        if settings.distill.teacher is not None:
            self._distill = settings.distill

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        clip_weights: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """The mean loss over the clips, a scalar."""
        if self._shift is not None:
            logits = logits + self._shift
        scores = as_scores(labels, self._kind, logits)
        # A loss from outside may know classes only.
        loss = self._loss(logits, self._smoothed(scores) if self._smoothing else labels)
        if teacher is not None and self._distill is not None:
            share = self._distill.weight
            loss = (1 - share) * loss + share * self._teacher_loss(logits, teacher)
        if not self._has_weights:
            return loss
        if self._class_weights is not None:
            if self._kind == "multilabel":
                loss = loss * self._class_weights
            else:
                own = class_shares(scores, self._kind) @ self._class_weights
                clip_weights = own if clip_weights is None else own * clip_weights
        if clip_weights is not None:
            loss = (loss.mean(1) if loss.ndim > 1 else loss) * clip_weights
        return loss.mean()

    def _smoothed(self, scores: Tensor) -> Tensor:
        classes = scores.shape[1] if self._kind == "multiclass" else 2
        return scores * (1 - self._smoothing) + self._smoothing / classes

    def _teacher_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Cross entropy with the teacher's scores, as a mean or of each clip, as the labels' is."""
        assert self._distill is not None
        temperature = self._distill.temperature
        reduction = "none" if self._has_weights else "mean"
        if self._kind == "multiclass":
            loss = categorical(logits / temperature, teacher, reduction)
        else:
            loss = binary_cross_entropy_with_logits(
                logits / temperature, teacher, reduction=reduction
            )
        # The gradient of soft scores is smaller by this factor.
        return loss * temperature**2


def class_weights(settings: LossSettings, target: Target, rates: ClassRates | None) -> Floats:
    """Weights of the classes, float64 [K], whose mean over the clips of a batch is 1; of labels
    that are independent of each other, whose plain mean is 1."""
    given, many = settings.class_weights, len(target.classes)
    if target.kind == "multilabel" or rates is None:
        shares = np.full(many, 1 / many)
    else:
        shares = rates.batches
    if isinstance(given, dict):
        weights = np.array([given.get(name, 1.0) for name in target.classes])
    else:
        weights = np.ones(many) if given is None else 1 / shares
    result: Floats = weights / (weights * shares).sum()
    return result


def logit_shift(settings: LossSettings, rates: ClassRates) -> Floats:
    """What is added to the logits of the classes in training, float64 [K]: the log of the share in
    the batches, less that of the mix that logits are to hold for (Menon et al. 2021)."""
    natural = settings.logit_adjustment == "natural"
    wanted = rates.natural if natural else np.full(len(rates.batches), 1 / len(rates.batches))
    result: Floats = np.log(rates.batches) - np.log(wanted)
    return result


def _check(settings: LossSettings, target: Target, rates: ClassRates | None) -> None:
    kind, given = target.kind, settings.class_weights
    refused = {
        "smoothing": (settings.smoothing > 0, ("ordinal", "regression")),
        "class_weights": (given is not None, ("regression",)),
        "logit_adjustment": (
            settings.logit_adjustment is not None,
            ("multilabel", "ordinal", "regression"),
        ),
        "distill": (settings.distill.teacher is not None, ("regression",)),
    }
    for name, (is_asked, kinds) in refused.items():
        if is_asked and kind in kinds:
            raise ConfigError(
                f"it is not defined for a target that is {kind}",
                where=f"loss.{name}",
                fix="Leave it out.",
            )
    if given == "balanced" and kind == "multilabel":
        raise ConfigError(
            "the plan does not hold the rates of several labels, so they cannot be balanced",
            where="loss.class_weights",
            fix="Give the weights by name.",
        )
    if isinstance(given, dict) and (unknown := given.keys() - set(target.classes)):
        raise ConfigError(
            f"there is no class {', '.join(sorted(unknown))}",
            where="loss.class_weights",
            fix=f"The classes are {', '.join(target.classes)}.",
        )
    needs_rates = given is not None and kind != "multilabel"
    if (needs_rates or settings.logit_adjustment is not None) and rates is None:
        raise ValueError("the rates of the classes are needed")
