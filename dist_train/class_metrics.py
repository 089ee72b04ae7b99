"""Metrics of held-out clips for each kind of target, by the names of the log.

All functions take what ``Target.scores`` and ``Target.truth`` give, N >= 1 clips, and compute in
float64. A mean over classes is over those for which the metric is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_train.errors import ConfigError, RunError
from dist_train.metrics import METRICS, Floats, Metric, binary_metrics
from dist_train.targets import Kind, Target

Array = NDArray[Any]


class KindMetric(NamedTuple):
    """A metric: ``function`` takes scores and truth, and gives None where it is not defined."""

    function: Callable[[Array, Array], float | None]
    higher_is_better: bool = True


def metrics_of(target: Target, scores: Array, truth: Array) -> dict[str, float | None]:
    """Every metric of the target's kind, by name; None if undefined.

    Args:
        scores, truth: see ``Target.scores`` and ``Target.truth``.

    Raises:
        RunError: a score is not a finite number.
    """
    if target.kind == "binary":
        return binary_metrics(scores, truth)
    known = METRICS_OF[target.kind]
    if not len(truth):
        return dict.fromkeys(known)
    if wrong := int(np.sum(~np.isfinite(scores).reshape(len(scores), -1).all(axis=1))):
        raise RunError(
            f"of {wrong} of {len(scores)} clips the scores are not finite numbers",
            fix="If the loss became NaN, resume before that with a lower learning rate",
        )
    both = np.asarray(scores, np.float64), np.asarray(truth)
    return {name: metric.function(*both) for name, metric in known.items()}


def higher_is_better(name: str, kind: Kind | None = None) -> bool:
    """Whether a higher value of a logged metric, such as val/auc, is better.

    Args:
        kind: of the run's target; None takes the metrics of all kinds.

    Raises:
        ConfigError: there is no such metric; the message lists all.
    """
    known = {"loss": False}
    for each in get_args(Kind) if kind is None else (kind,):
        metrics: Mapping[str, Metric | KindMetric]
        metrics = METRICS if each == "binary" else METRICS_OF[each]
        known |= {metric: one.higher_is_better for metric, one in metrics.items()}
    split, _, metric = name.rpartition("/")
    if split != "val" or metric not in known:
        of = "" if kind is None else f" for kind {kind}"
        raise ConfigError(
            f"there is no metric {name!r}{of}; there are "
            f"{', '.join(f'val/{metric}' for metric in known)}"
        )
    return known[metric]


def prior_correct_classes(
    probability: ArrayLike, trained_at: Sequence[float], world: Sequence[float]
) -> Floats:
    """Move probabilities of K classes, [N, K], from the shares of classes they were fitted at to
    others, by Bayes' rule (Saerens, Latinne and Decaestecker, "Adjusting the outputs of a
    classifier to new a priori probabilities", Neural Computation 14, 2002). All shares are above
    0."""
    odds: Floats = np.asarray(probability, np.float64) * (np.array(world) / np.array(trained_at))
    whole: Floats = odds / odds.sum(axis=1, keepdims=True)
    return whole


def confusion_matrix(scores: Array, truth: Array) -> NDArray[np.int64]:
    """Clips by true class (rows) and predicted class: int64 [K, K]. The predicted class is the one
    of the highest probability; of equals, the first."""
    classes = scores.shape[1]
    cells = truth * classes + scores.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def multiclass_mcc(counts: NDArray[np.int64]) -> float:
    """The correlation coefficient R_K of Gorodkin, "Comparing two K-category assignments by a
    K-category correlation coefficient" (Computational Biology and Chemistry 28, 2004); for two
    classes it is Matthews'. 0 if all clips get, or have, one class."""
    table = counts.astype(np.float64)
    clips, right = table.sum(), np.trace(table)
    true, called = table.sum(axis=1), table.sum(axis=0)
    scale = np.sqrt(clips**2 - called @ called) * np.sqrt(clips**2 - true @ true)
    return float((right * clips - true @ called) / scale) if scale > 0 else 0.0


def cohen_kappa(counts: NDArray[np.int64], *, quadratic: bool = False) -> float | None:
    """Agreement beyond chance (Cohen 1960); ``quadratic``: a disagreement counts by the square of
    its distance in codes (Cohen 1968). None if both are always of one and the same class."""
    table = counts.astype(np.float64)
    codes = np.arange(len(table))
    apart = np.subtract.outer(codes, codes)
    cost = np.square(apart).astype(np.float64) if quadratic else (apart != 0).astype(np.float64)
    by_chance = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    expected = (cost * by_chance).sum()
    return float(1 - (cost * table).sum() / expected) if expected > 0 else None


def _accuracy(scores: Array, truth: Array) -> float:
    return float(np.mean(scores.argmax(axis=1) == truth))


def _balanced_accuracy(scores: Array, truth: Array) -> float:
    """The mean over classes of the share of their clips that is called so."""
    counts = confusion_matrix(scores, truth)
    clips = counts.sum(axis=1)
    return float(np.mean(np.diag(counts)[clips > 0] / clips[clips > 0]))


def _kappa(quadratic: bool) -> Callable[[Array, Array], float | None]:
    return lambda scores, truth: cohen_kappa(confusion_matrix(scores, truth), quadratic=quadratic)


def _mcc(scores: Array, truth: Array) -> float:
    return multiclass_mcc(confusion_matrix(scores, truth))


def _one_against_rest(name: str) -> Callable[[Array, Array], float | None]:
    """The mean over classes of a binary metric of each class, from codes [N] or 0 and 1 [N, K]."""

    def mean(scores: Array, truth: Array) -> float | None:
        found = []
        for k in range(scores.shape[1]):
            labels = truth == k if truth.ndim == 1 else truth[:, k]
            if 0 < labels.sum() < len(labels):
                found.append(METRICS[name].function(scores[:, k], labels.astype(np.int64)))
        return float(np.mean(found)) if found else None

    return mean


def _distance(scores: Array, truth: Array) -> float:
    """The mean distance of the predicted class from the true one, in codes."""
    return float(np.mean(np.abs(scores.argmax(axis=1) - truth)))


def _label_accuracy(scores: Array, truth: Array) -> float:
    return float(np.mean((scores > 0.5) == truth))


def _mae(scores: Array, truth: Array) -> float:
    return float(np.abs(scores - truth).mean())


def _rmse(scores: Array, truth: Array) -> float:
    """The mean over values of the root of the mean squared error."""
    return float(np.sqrt(np.square(scores - truth).mean(axis=0)).mean())


def _r2(scores: Array, truth: Array) -> float | None:
    """The mean over values of the share of the variance that is explained."""
    spread: Floats = np.square(truth - truth.mean(axis=0)).sum(axis=0)
    varies = spread > 0
    if not varies.any():
        return None
    rest = np.square(scores - truth).sum(axis=0)
    return float(np.mean(1 - rest[varies] / spread[varies]))


_CLASSES: dict[str, KindMetric] = {
    "mcc": KindMetric(_mcc),
    "accuracy": KindMetric(_accuracy),
    "balanced_accuracy": KindMetric(_balanced_accuracy),
    "kappa": KindMetric(_kappa(quadratic=False)),
    "auc": KindMetric(_one_against_rest("auc")),
    "ap": KindMetric(_one_against_rest("ap")),
}
#: The metrics of kinds other than binary, whose are ``metrics.METRICS``. The first is the main one.
METRICS_OF: dict[Kind, dict[str, KindMetric]] = {
    "multiclass": _CLASSES,
    "ordinal": {
        "qwk": KindMetric(_kappa(quadratic=True)),
        "mae": KindMetric(_distance, higher_is_better=False),
        **_CLASSES,
    },
    "multilabel": {
        "ap": KindMetric(_one_against_rest("ap")),
        "auc": KindMetric(_one_against_rest("auc")),
        "accuracy": KindMetric(_label_accuracy),
    },
    "regression": {
        "mae": KindMetric(_mae, higher_is_better=False),
        "rmse": KindMetric(_rmse, higher_is_better=False),
        "r2": KindMetric(_r2),
    },
}


def main_metric(kind: Kind) -> tuple[str, str]:
    """The metric that stands for a run of this kind: its name in the log, and for people."""
    if kind == "binary":
        return "mcc@0.5", "MCC"
    name = next(iter(METRICS_OF[kind]))
    return name, {"qwk": "quadratic kappa"}.get(name, name.upper())
