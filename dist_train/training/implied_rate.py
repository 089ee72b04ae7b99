"""The shares of the classes that the probabilities of a trained model are of."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit

from dist_train.config import LossSettings
from dist_train.targets import Target
from dist_train.training.class_rates import ClassRates, Floats
from dist_train.training.crowd_scores import CrowdScores
from dist_train.training.training_loss import class_weights, logit_shift


def implied_rate(
    settings: LossSettings, target: Target, rates: ClassRates, crowd: CrowdScores | None
) -> float:
    """The share of positives in the batches of two classes, as the loss counts them: by their
    weights and soft labels, and moved by the adjustment of logits.

    Calibration begins with it. It does not know smoothing and the focal loss, which make
    probabilities less sure at any share.
    """
    if settings.class_weights is None and settings.logit_adjustment is None and crowd is None:
        return float(rates.batches[1])
    no, yes = class_weights(settings, target, rates)
    if crowd is None:
        positives, total = np.array([0, yes]), np.array([no, yes])
    else:
        labels, sureness = crowd.of_training()
        own = sureness * (no * (1 - labels) + yes * labels)
        positives, total = crowd.class_means(own * labels), crowd.class_means(own)
    share = float(rates.batches @ positives) / float(rates.batches @ total)
    if settings.logit_adjustment is None:
        return share
    shift = logit_shift(settings, rates)
    return float(expit(logit(share) - (shift[1] - shift[0])))


def implied_shares(settings: LossSettings, target: Target, rates: ClassRates) -> Floats:
    """As ``implied_rate``: the share of each class, float64 [K], of a target with one class a
    clip."""
    shares = rates.batches * class_weights(settings, target, rates)
    if settings.logit_adjustment is not None:
        shares = shares * np.exp(-logit_shift(settings, rates))
    result: Floats = shares / shares.sum()
    return result
