"""Probabilities that are frequencies: a mapping fitted on held-out clips, then the world's prior.

Three steps, in this order:
1. From the training batches' share of positives to that of val, by Bayes' rule.
2. A mapping fitted on val: none, temperature scaling (Guo, Pleiss, Sun and Weinberger, "On
   calibration of modern neural networks", ICML 2017), temperature and bias (Platt, "Probabilistic
   outputs for support vector machines", 1999), or isotonic regression (Zadrozny and Elkan,
   "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002).
3. From val's share of positives to the world's, by Bayes' rule.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, log_expit, logit

from dist_train.metrics import Floats, expected_calibration_error, prior_correct

Method = Literal["none", "temperature", "temperature and bias", "isotonic"]
Share = Annotated[float, Field(gt=0, lt=1)]
#: From the simplest to the one with the most freedom.
METHODS: tuple[Method, ...] = ("none", "temperature", "temperature and bias", "isotonic")
FOLDS = 5
#: Least clips of the rarer class in val to fit a temperature, and to fit more.
FEWEST, FEWEST_FOR_MORE = 5, 20
#: Distance kept from 0 and 1, which have no logit.
_EDGE = 1e-7


class Reliability(BaseModel):
    """How far probabilities are from what happens; less is better in all three."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log_loss: float
    brier: float
    ece: float


class Mapping(BaseModel):
    """A mapping of probabilities at val's share of positives (step 2).

    A clip of logit z gets the probability sigmoid(slope * z + bias) or, by isotonic regression, the
    value at z of the line through ``points``, which is constant beyond its ends.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    slope: float = 1.0
    """1 / temperature."""
    bias: float = 0.0
    points: tuple[tuple[float, float], ...] = ()
    """(logit, probability), ascending in both."""

    @model_validator(mode="after")
    def _check_points(self) -> Mapping:
        if self.method == "isotonic" and not self.points:
            raise ValueError("isotonic regression has no points")
        return self

    def map(self, probability: Floats) -> Floats:
        """Mapped probabilities, float64 [N]."""
        if self.method == "none":
            return probability
        z = _logit(probability)
        if self.method != "isotonic":
            return np.asarray(expit(self.slope * z + self.bias), dtype=np.float64)
        x, y = np.array(self.points, dtype=np.float64).T
        return np.asarray(np.interp(z, x, y), dtype=np.float64)


class Calibration(Mapping):
    """All three steps from a model's probabilities to calibrated ones, and how they were chosen."""

    batches_share: Share
    """Share of positives in the training batches."""
    val_share: Share
    """Share of positives among the val clips; the prior, if that is 0 or 1."""
    prior: Share
    """Share of positives in the world."""
    clips: int
    """Labelled val clips."""
    positives: int
    cross_validated: dict[Method, Reliability]
    """Of each method that was tried, on val clips that it was not fitted on; at val's share."""
    snapshots: tuple[str, ...] = ()
    """Files of the weights whose mean probability it maps."""
    raw: Reliability | None
    """Of the model's own probabilities of the val clips; None without labelled clips."""

    def apply(self, probability: ArrayLike) -> Floats:
        """Calibrated probabilities, float64 [N], of a model's probabilities, [N] in 0..1.

        The order of clips stays, but isotonic regression makes some equal.
        """
        shifted = prior_correct(probability, self.batches_share, self.val_share)
        return prior_correct(self.map(shifted), self.val_share, self.prior)


def fit(
    probability: ArrayLike, label: ArrayLike, *, batches_share: float, prior: float
) -> Calibration:
    """Choose a mapping by cross-validated log loss, and fit it on all clips.

    The folds are stratified by class. The choice is the simplest method whose loss is within one
    standard error of the least (the rule of Breiman et al. 1984); the error is that of the
    difference of the two. With fewer than 20 clips of the rarer class only a temperature is tried,
    and with fewer than 5 nothing.

    Args:
        probability: [N] in 0..1, of the labelled val clips, at the training batches' share.
        label: [N] of 0 and 1.
        batches_share: share of positives in the training batches.
        prior: share of positives in the world.

    Raises:
        ConfigError: a share is not strictly between 0 and 1.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    positives = int(y.sum())
    rarer = min(positives, len(y) - positives)
    share = positives / len(y) if rarer else prior
    shifted = prior_correct(p, batches_share, share)
    held_out: dict[Method, Floats] = {}
    if rarer >= FEWEST:
        fold = folds(y)
        for method in METHODS if rarer >= FEWEST_FOR_MORE else METHODS[:2]:
            held_out[method] = np.empty(len(y))
            for number in range(FOLDS):
                inside = fold == number
                mapping = _fit_mapping(method, shifted[~inside], y[~inside])
                held_out[method][inside] = mapping.map(shifted[inside])
    best = simplest({method: _losses(q, y) for method, q in held_out.items()})
    chosen = _fit_mapping(best, shifted, y)
    return Calibration(
        **chosen.model_dump(),
        batches_share=batches_share,
        val_share=share,
        prior=prior,
        clips=len(y),
        positives=positives,
        cross_validated={method: reliability_of(q, y) for method, q in held_out.items()},
        raw=reliability_of(p, y) if len(y) else None,
    )


def reliability_of(probability: ArrayLike, label: ArrayLike) -> Reliability:
    """Reliability of probabilities [N] in 0..1 for labels [N] of 0 and 1."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    return Reliability(
        log_loss=float(_losses(p, y).mean()),
        brier=float(np.square(p - y).mean()),
        ece=expected_calibration_error(p, y),
    )


def folds(y: ArrayLike) -> np.ndarray:
    """The fold of each clip, int64 [N]: each class of ``y`` [N] dealt evenly, always the same."""
    y = np.asarray(y)
    fold = np.empty(len(y), dtype=np.int64)
    random = np.random.RandomState(0)
    for label in np.unique(y):
        clips = random.permutation(np.flatnonzero(y == label))
        fold[clips] = np.arange(len(clips)) % FOLDS
    return fold


def simplest(losses: dict[Method, Floats]) -> Method:
    """The simplest method that is about as good as the best, by the losses [N] of each; "none" if
    none was tried."""
    for method, loss in losses.items():
        excess = loss - min(losses.values(), key=np.mean)
        if excess.mean() <= excess.std() / np.sqrt(len(loss)):
            return method
    return "none"


def _fit_mapping(method: Method, p: Floats, y: Floats) -> Mapping:
    if method == "none":
        return Mapping(method=method)
    if method == "isotonic":
        return Mapping(method=method, points=_isotonic(_logit(p), y))
    slope, bias = _scaled(_logit(p), y, has_bias=method != "temperature")
    return Mapping(method=method, slope=slope, bias=bias)


def _scaled(z: Floats, y: Floats, *, has_bias: bool) -> tuple[float, float]:
    """Slope and bias of the least log loss.

    The targets are Platt's, a little inside of 0 and 1: otherwise the slope would go to infinity
    when the model separates the clips without error.
    """
    ones = y.sum()
    target = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (len(y) - ones + 2))

    def loss(at: Floats) -> tuple[float, Floats]:
        mapped = at[0] * z + (at[1] if has_bias else 0.0)
        value = -(target * log_expit(mapped) + (1 - target) * log_expit(-mapped)).mean()
        error = expit(mapped) - target
        return float(value), np.array([(error * z).mean(), error.mean() if has_bias else 0.0])

    # A slope of zero or less would reverse the order of clips.
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(1e-3, 1e3), (-50, 50)])
    return float(found.x[0]), float(found.x[1])


def _isotonic(z: Floats, y: Floats) -> tuple[tuple[float, float], ...]:
    """Both ends of each block of equal probability.

    By the rule of succession, probabilities are no nearer to 0 or 1 than so few clips allow.
    """
    x, where, count = np.unique(z, return_inverse=True, return_counts=True)
    edge = 1 / (len(y) + 2)
    level = isotonic_regression(np.bincount(where, weights=y) / count, weights=count).x
    level = level.clip(edge, 1 - edge)
    change = np.flatnonzero(np.diff(level))
    ends = np.unique(np.concatenate(([0], change, change + 1, [len(x) - 1])))
    return tuple(zip(x[ends].tolist(), level[ends].tolist(), strict=True))


def _losses(p: Floats, y: Floats) -> Floats:
    inside = p.clip(_EDGE, 1 - _EDGE)
    return -np.log(np.where(y == 1, inside, 1 - inside))


def _logit(p: Floats) -> Floats:
    return np.asarray(logit(p.clip(_EDGE, 1 - _EDGE)), dtype=np.float64)
