"""Probabilities that are frequencies: a mapping fitted on held-out clips, then the world's prior.

Three steps, in this order:
1. From the training batches' share of positives to that of val, by Bayes' rule.
2. A mapping that is fitted on val: none, temperature scaling (Guo, Pleiss, Sun and Weinberger, "On
   calibration of modern neural networks", ICML 2017), the same with a bias (Platt, "Probabilistic
   outputs for support vector machines", 1999), or isotonic regression (Zadrozny and Elkan,
   "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002).
3. From val's share of positives to the world's, by Bayes' rule.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
#: Clips of the rarer class in val: with fewer nothing is fitted, or no more than a temperature.
FEWEST, FEWEST_FOR_MORE = 5, 20
#: A probability of 0 or 1 has no logit.
_EDGE = 1e-7


class Reliability(BaseModel):
    """How far probabilities are from what happens; less is better in all three."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log_loss: float
    brier: float
    ece: float


class Calibration(BaseModel):
    """The mapping from a model's probabilities to calibrated ones, and how it was chosen.

    After step 1 a clip of logit z has the probability sigmoid(slope * z + bias), or, by isotonic
    regression, what lies at z on the line through ``points`` (constant beyond its ends).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    slope: float = 1.0
    """1 / temperature."""
    bias: float = 0.0
    points: tuple[tuple[float, float], ...] = ()
    """(logit, probability), ascending in both."""
    batches_share: Share
    """Share of positives in the training batches."""
    val_share: Share
    """Share of positives among the val clips; the prior, where that is 0 or 1."""
    prior: Share
    """Share of positives in the world."""
    clips: int
    """Labelled val clips."""
    positives: int
    cross_validated: dict[Method, Reliability]
    """Of the methods that were tried, on val clips that each was not fitted on; at val's share."""
    snapshots: tuple[str, ...] = ()
    """Files of the weights whose mean probability it maps."""
    raw: Reliability | None
    """Of the model's own probabilities of the val clips; None without labelled clips."""

    @model_validator(mode="after")
    def _check_points(self) -> Calibration:
        if self.method == "isotonic" and not self.points:
            raise ValueError("isotonic regression has no points")
        return self

    def apply(self, probability: ArrayLike) -> Floats:
        """Calibrated probabilities, float64 [N], of a model's, [N] in 0..1. Order stays, but that
        isotonic regression makes some equal."""
        shifted = prior_correct(probability, self.batches_share, self.val_share)
        return prior_correct(self._mapped(shifted), self.val_share, self.prior)

    def _mapped(self, shifted: Floats) -> Floats:
        if self.method == "none":
            return shifted
        z = _logit(shifted)
        if self.method != "isotonic":
            return np.asarray(expit(self.slope * z + self.bias), dtype=np.float64)
        x, y = np.array(self.points, dtype=np.float64).T
        return np.asarray(np.interp(z, x, y), dtype=np.float64)


def fit(
    probability: ArrayLike, label: ArrayLike, *, batches_share: float, prior: float
) -> Calibration:
    """Choose a mapping by cross-validated log loss, and fit it on all clips.

    Five folds, stratified by class. Chosen is the simplest method whose loss is within one standard
    error of the least (the rule of Breiman et al. 1984), the error being that of the difference of
    the two. With fewer than 20 clips of the rarer class only a temperature is tried, and with fewer
    than 5 nothing.

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
    tried = METHODS
    if rarer < FEWEST_FOR_MORE:
        tried = METHODS[:2] if rarer >= FEWEST else METHODS[:1]

    def made(method: Method, chosen: np.ndarray) -> Calibration:
        return Calibration(
            method=method,
            **_fitted(method, _logit(shifted[chosen]), y[chosen]),
            batches_share=batches_share,
            val_share=share,
            prior=prior,
            clips=len(y),
            positives=positives,
            cross_validated={m: reliability_of(q, y) for m, q in unseen.items()},
            raw=reliability_of(p, y) if len(y) else None,
        )

    unseen: dict[Method, Floats] = {}
    everything = np.ones(len(y), dtype=bool)
    if rarer < FEWEST:
        return made("none", everything)
    fold = _folds(y)
    held_out: dict[Method, Floats] = {}
    for method in tried:
        of_method = np.empty(len(y))
        for number in range(FOLDS):
            inside = fold == number
            of_method[inside] = made(method, ~inside)._mapped(shifted[inside])
        held_out[method] = of_method
    unseen = held_out
    return made(_simplest(held_out, y), everything)


def reliability_of(probability: ArrayLike, label: ArrayLike) -> Reliability:
    """Of probabilities [N] in 0..1 and labels [N] of 0 and 1."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    return Reliability(
        log_loss=float(_losses(p, y).mean()),
        brier=float(np.square(p - y).mean()),
        ece=expected_calibration_error(p, y),
    )


def _simplest(held_out: dict[Method, Floats], y: Floats) -> Method:
    losses = {method: _losses(p, y) for method, p in held_out.items()}
    best = min(losses, key=lambda method: float(losses[method].mean()))
    for method, own in losses.items():
        more = own - losses[best]
        if more.mean() <= more.std() / np.sqrt(len(y)):
            return method
    raise AssertionError("the best is within any error of itself")


def _fitted(method: Method, z: Floats, y: Floats) -> dict[str, Any]:
    if method == "none":
        return {}
    if method == "isotonic":
        return {"points": _isotonic(z, y)}
    slope, bias = _scaled(z, y, has_bias=method != "temperature")
    return {"slope": slope, "bias": bias}


def _scaled(z: Floats, y: Floats, *, has_bias: bool) -> tuple[float, float]:
    """Slope and bias of the least log loss. Targets are Platt's, a little within 0 and 1, so that
    clips that the model separates without error do not draw the slope to infinity."""
    ones = y.sum()
    target = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (len(y) - ones + 2))

    def loss(at: Floats) -> tuple[float, Floats]:
        of = at[0] * z + (at[1] if has_bias else 0.0)
        value = -(target * log_expit(of) + (1 - target) * log_expit(-of)).mean()
        off = expit(of) - target
        return float(value), np.array([(off * z).mean(), off.mean() if has_bias else 0.0])

    # A slope of zero or less would turn the order round.
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(1e-3, 1e3), (-50, 50)])
    return float(found.x[0]), float(found.x[1])


def _isotonic(z: Floats, y: Floats) -> tuple[tuple[float, float], ...]:
    """Ends of the blocks of equal probability, by pooling adjacent violators; the probabilities of
    so few clips are never nearer to 0 or 1 than the rule of succession allows."""
    x, where, count = np.unique(z, return_inverse=True, return_counts=True)
    mean = np.bincount(where, weights=y) / count
    level = isotonic_regression(mean, weights=count).x
    edge = 1 / (len(y) + 2)
    level = level.clip(edge, 1 - edge)
    change = np.flatnonzero(np.diff(level))
    ends = np.unique(np.concatenate(([0], change, change + 1, [len(x) - 1])))
    return tuple(zip(x[ends].tolist(), level[ends].tolist(), strict=True))


def _folds(y: Floats) -> np.ndarray:
    """A fold for each clip, each class dealt evenly, always the same: int64 [N]."""
    fold = np.empty(len(y), dtype=np.int64)
    random = np.random.RandomState(0)
    for label in (0, 1):
        clips = random.permutation(np.flatnonzero(y == label))
        fold[clips] = np.arange(len(clips)) % FOLDS
    return fold


def _losses(p: Floats, y: Floats) -> Floats:
    inside = p.clip(_EDGE, 1 - _EDGE)
    return -np.log(np.where(y == 1, inside, 1 - inside))


def _logit(p: Floats) -> Floats:
    return np.asarray(logit(p.clip(_EDGE, 1 - _EDGE)), dtype=np.float64)
