"""Calibration of several classes or labels, as ``calibration.py`` calibrates two classes.

Classes of which a clip has one: the same three steps, with a share for each class. The mapping is
none, a temperature, or a temperature and a bias for each class (Alexandari, Kundaje and Shrikumar,
"Maximum likelihood with bias-corrected calibration is hard-to-beat at label shift adaptation", ICML
2020). For two classes they are those of ``calibration.py``.

Labels of which a clip may have several: each by itself, as the positive one of two classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from dist_train.class_metrics import prior_correct_classes
from dist_train.evaluation.calibration import (
    FEWEST,
    FEWEST_FOR_MORE,
    FOLDS,
    METHODS,
    Calibration,
    Method,
    Reliability,
    Share,
    folds,
    reliability_of,
    simplest,
)
from dist_train.evaluation.calibration import fit as fit_label
from dist_train.metrics import Floats, Labels, expected_calibration_error
from dist_train.targets import Kind

Shares = tuple[Share, ...]
#: Least probability, whose logarithm is taken.
_EDGE = 1e-12


class ClassMapping(BaseModel):
    """A mapping of probabilities p of K classes: softmax(slope * log(p) + bias)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    slope: float = 1.0
    """1 / temperature."""
    bias: tuple[float, ...] = ()
    """Of each class; their sum is 0. Empty without biases."""

    def map(self, probability: Floats) -> Floats:
        """Mapped probabilities, float64 [N, K]."""
        if self.method == "none":
            return probability
        bias = np.array(self.bias) if self.bias else 0.0
        mapped: Floats = softmax(self.slope * _log(probability) + bias, axis=1)
        return mapped


class ClassCalibration(ClassMapping):
    """From a model's probabilities of K classes to calibrated ones, and how that was chosen."""

    batches_share: Shares
    """Share of each class in the training batches."""
    val_share: Shares
    """Share of each class among the val clips; the prior, if one of them has none."""
    prior: Shares
    """Share of each class in the world."""
    counts: tuple[int, ...]
    """Labelled val clips of each class."""
    cross_validated: dict[Method, Reliability]
    """Of each method that was tried, on val clips that it was not fitted on; at val's shares."""
    snapshots: tuple[str, ...] = ()
    """Files of the weights whose mean probability it maps."""
    raw: Reliability | None
    """Of the model's own probabilities of the val clips; None without labelled clips."""

    def apply(self, probability: ArrayLike) -> Floats:
        """Calibrated probabilities, float64 [N, K], of a model's probabilities [N, K]."""
        shifted = prior_correct_classes(probability, self.batches_share, self.val_share)
        return prior_correct_classes(self.map(shifted), self.val_share, self.prior)


class LabelCalibration(BaseModel):
    """The calibration of each label, by name, in the order of the columns of probabilities."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: Annotated[dict[str, Calibration], Field(min_length=1)]
    snapshots: tuple[str, ...] = ()
    """Files of the weights whose mean probability it maps."""

    def apply(self, probability: ArrayLike) -> Floats:
        """Calibrated probabilities, float64 [N, K], of a model's probabilities [N, K]."""
        columns = np.asarray(probability, np.float64).T
        each = [c.apply(p) for c, p in zip(self.labels.values(), columns, strict=True)]
        return np.stack(each, axis=1)


AnyCalibration = Calibration | ClassCalibration | LabelCalibration
#: Of the kinds that have one.
CALIBRATIONS: dict[Kind, type[AnyCalibration]] = {
    "binary": Calibration,
    "multiclass": ClassCalibration,
    "ordinal": ClassCalibration,
    "multilabel": LabelCalibration,
}


def fit_classes(
    probability: ArrayLike, truth: ArrayLike, *, batches_share: Shares, prior: Shares
) -> ClassCalibration:
    """Choose a mapping by cross-validated log loss, as ``calibration.fit``, and fit it on all.

    A temperature is tried if at least 5 clips are not of the commonest class, and biases, too, if
    each class has at least 20.

    Args:
        probability: [N, K], of the labelled val clips, at the training batches' shares.
        truth: class codes [N].
        batches_share, prior: K shares, see ``ClassCalibration``.
    """
    p, y = np.asarray(probability, np.float64), np.asarray(truth, np.int64)
    counts = np.bincount(y, minlength=len(prior))
    share = tuple((counts / len(y)).tolist()) if counts.min() else prior
    shifted = prior_correct_classes(p, batches_share, share)
    held_out: dict[Method, Floats] = {}
    if len(y) - counts.max() >= FEWEST:
        fold = folds(y)
        for method in METHODS[: 3 if counts.min() >= FEWEST_FOR_MORE else 2]:
            held_out[method] = np.empty_like(p)
            for number in range(FOLDS):
                inside = fold == number
                mapping = _fit_mapping(method, shifted[~inside], y[~inside])
                held_out[method][inside] = mapping.map(shifted[inside])
    best = simplest({method: _losses(q, y) for method, q in held_out.items()})
    return ClassCalibration(
        **_fit_mapping(best, shifted, y).model_dump(),
        batches_share=batches_share,
        val_share=share,
        prior=prior,
        counts=tuple(counts.tolist()),
        cross_validated={method: reliability_of_classes(q, y) for method, q in held_out.items()},
        raw=reliability_of_classes(p, y) if len(y) else None,
    )


def fit_labels(
    probability: Floats,
    truth: Labels,
    names: Sequence[str],
    *,
    batches_share: Mapping[str, float],
    prior: Mapping[str, float],
) -> LabelCalibration:
    """Fit each label by itself.

    Args:
        probability: [N, K], of the labelled val clips.
        truth: 0 and 1, [N, K].
        names: of the K labels.
        batches_share, prior: of each label's clips in the training batches, and in the world.
    """
    return LabelCalibration(
        labels={
            name: fit_label(
                probability[:, k],
                truth[:, k],
                batches_share=batches_share[name],
                prior=prior[name],
            )
            for k, name in enumerate(names)
        }
    )


def reliability_of_classes(probability: Floats, truth: Labels) -> Reliability:
    """Reliability of probabilities [N, K] for class codes [N]: the Brier score is the sum over
    classes (Brier 1950), and the calibration error that of the predicted class (Guo et al.
    2017)."""
    is_class = np.eye(probability.shape[1])[truth]
    right = probability.argmax(axis=1) == truth
    return Reliability(
        log_loss=float(_losses(probability, truth).mean()),
        brier=float(np.square(probability - is_class).sum(axis=1).mean()),
        ece=expected_calibration_error(np.minimum(probability.max(axis=1), 1.0), right),
    )


def reliability_of_labels(probability: Floats, truth: Labels) -> Reliability:
    """The mean over labels of their reliability."""
    each = [reliability_of(p, y).model_dump() for p, y in zip(probability.T, truth.T, strict=True)]
    return Reliability(**{name: float(np.mean([one[name] for one in each])) for name in each[0]})


def _fit_mapping(method: Method, p: Floats, y: Labels) -> ClassMapping:
    """The slope, and biases, of the least log loss, for targets a little inside of 0 and 1: Platt's
    for K classes."""
    if method == "none":
        return ClassMapping(method=method)
    has_bias = method != "temperature"
    z, classes = _log(p), p.shape[1]
    counts = np.bincount(y, minlength=classes)[y][:, None]
    target = (np.eye(classes)[y] * counts + 1) / (counts + classes)

    def loss(at: Floats) -> tuple[float, Floats]:
        mapped = log_softmax(at[0] * z + (at[1:] if has_bias else 0.0), axis=1)
        error = np.exp(mapped) - target
        slope = (error * z).sum(axis=1).mean()
        by_bias = error.mean(axis=0) if has_bias else np.zeros(0)
        return -float((target * mapped).sum(axis=1).mean()), np.append(slope, by_bias)

    free = classes if has_bias else 0
    start, bounds = np.append(1.0, np.zeros(free)), [(1e-3, 1e3), *[(-50, 50)] * free]
    found = minimize(loss, start, jac=True, bounds=bounds).x
    bias = found[1:] - found[1:].mean() if has_bias else found[1:]
    return ClassMapping(method=method, slope=float(found[0]), bias=tuple(bias.tolist()))


def _losses(p: Floats, y: Labels) -> Floats:
    return -_log(p)[np.arange(len(y)), y]


def _log(p: Floats) -> Floats:
    return np.log(np.maximum(p, _EDGE))
