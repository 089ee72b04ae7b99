"""Figures of merit for a binary classifier of rare events, and the Bayes prior correction.

All functions take probabilities of shape [N] in 0..1 and labels of shape [N] in {0, 1}, as numpy
arrays or CPU tensors, and compute in float64. A clip is called positive when its probability is
strictly greater than the threshold.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_train.errors import ConfigError, RunError

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

THRESHOLDS = (0.4, 0.5, 0.6, 0.7)


class Confusion(NamedTuple):
    """Counts of clips by true class and predicted class."""

    tn: int
    fp: int
    fn: int
    tp: int


class Reliability(NamedTuple):
    """Predicted against observed frequency in each bin; three arrays of shape [bins]."""

    predicted: Floats
    observed: Floats
    clips: Labels


def binary_metrics(probability: ArrayLike, label: ArrayLike) -> dict[str, float | None]:
    """Every metric of ``METRICS``, by name. None where it is undefined: with no clip, or, for most,
    with labels of one class only.

    Raises:
        RunError: a probability is not a number in 0..1, as after a diverged step.
    """
    scores, truth = _checked(probability, label)
    both_classes = 0 < truth.sum() < len(truth)
    return {
        name: float(metric.function(scores, truth))
        if len(truth) and (both_classes or not metric.needs_both_classes)
        else None
        for name, metric in METRICS.items()
    }


def higher_is_better(name: str) -> bool:
    """Whether the higher value of a logged metric, such as val/auc, is the better one.

    Raises:
        ConfigError: there is no such metric; the message names those that there are.
    """
    split, _, metric = name.rpartition("/")
    if split == "val" and metric == "loss":
        return False
    if split != "val" or metric not in METRICS:
        raise ConfigError(
            f"there is no metric {name!r}; there are "
            f"{', '.join(['val/loss', *(f'val/{known}' for known in METRICS)])}"
        )
    return METRICS[metric].higher_is_better


def roc_curve(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """Receiver operating characteristic: the rates at every threshold, from high to low.

    Returns:
        False and true positive rates [K + 1], both ascending from 0 to 1, where K is the number of
        distinct scores. NaN for a class that has no clips.

    Raises:
        RunError: a probability is not a number in 0..1.
    """
    fp, tp = _called_positive(*_checked(probability, label))
    with np.errstate(invalid="ignore"):
        return fp / fp[-1], tp / tp[-1]


def precision_recall_curve(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """Recall and precision at every threshold, from high to low.

    Average precision is the area under its steps, without interpolation: the sum of
    ``precision[k] * (recall[k] - recall[k - 1])``.

    Returns:
        Recall [K + 1], ascending from 0 to 1, and precision [K + 1], which is 1 where no clip is
        called positive; K is the number of distinct scores. Recall is NaN without positives.

    Raises:
        RunError: a probability is not a number in 0..1.
    """
    fp, tp = _called_positive(*_checked(probability, label))
    with np.errstate(invalid="ignore"):
        return tp / tp[-1], np.append(1.0, tp[1:] / (tp + fp)[1:])


def confusion(probability: ArrayLike, label: ArrayLike, threshold: float) -> Confusion:
    """Counts at one threshold.

    Raises:
        RunError: a probability is not a number in 0..1.
        ConfigError: the threshold is not a finite number.
    """
    _check_threshold(threshold)
    scores, truth = _checked(probability, label)
    tn, fp, fn, tp = np.bincount(2 * truth + (scores > threshold), minlength=4).tolist()
    return Confusion(tn, fp, fn, tp)


def mcc(counts: Confusion) -> float:
    """Matthews correlation coefficient; 0 where the model gives every clip the same class."""
    return float(_mcc(*(np.asarray(count) for count in counts)))


def mcc_curve(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """MCC at every distinct score, exactly.

    Returns:
        Thresholds [K], the distinct scores in ascending order, and MCC [K]; ``mcc[k]`` holds for
        every threshold from ``thresholds[k]`` up to, but not including, ``thresholds[k + 1]``.

    Raises:
        RunError: a probability is not a number in 0..1.
    """
    thresholds, positives, negatives = _histograms(*_checked(probability, label))
    fn, tn = np.cumsum(positives), np.cumsum(negatives)
    return thresholds, _mcc(tn, tn[-1] - tn, fn, fn[-1] - fn)


def best_threshold(probability: ArrayLike, label: ArrayLike) -> float:
    """A threshold of the highest MCC that the clips can tell from its neighbours.

    The very highest value often hangs on a single clip: one positive scored at 0.002 can draw the
    threshold there, although every one up to 0.7 does as well for all that these clips can say. So
    thresholds within one standard error of the best count as equally good (the rule of Breiman,
    Friedman, Olshen and Stone, "Classification and Regression Trees", 1984), but none below half
    of the best. The answer is the middle of the widest interval of them.

    Raises:
        RunError: a probability is not a number in 0..1.
    """
    thresholds, values = mcc_curve(probability, label)
    highest = int(np.argmax(values))
    slack = 1e-12
    if values[highest] > 0:
        draws, _ = stratified_bootstrap(probability, label, thresholds[highest], resamples=200)
        slack += min(float(draws.std()), values[highest] / 2)
    good = values >= values[highest] - slack
    edges = np.append(thresholds, 1.0)
    flanks = np.diff(np.concatenate(([0], good.astype(np.int8), [0])))
    lower, upper = edges[flanks == 1], edges[np.flatnonzero(flanks == -1)]
    widest = int(np.argmax(upper - lower))
    middle = (lower[widest] + upper[widest]) / 2
    # Between two neighbouring floats the middle rounds to one of them; the upper one is outside.
    return float(middle if middle < upper[widest] else lower[widest])


def prior_correct(probability: ArrayLike, trained_at: float, world: float) -> Floats:
    """Move probabilities from the positive rate of the training batches to that of the world.

    Bayes' rule with the class likelihoods held fixed: equation 4 of Saerens, Latinne and
    Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities", Neural
    Computation 14 (2002). The order of the clips, and so AUC and AP, stays the same; 0 and 1 stay
    what they are.

    Args:
        probability: [N] in 0..1.
        trained_at: share of positives in the batches that the model was trained on.
        world: share of positives where the probabilities will be used.

    Raises:
        ConfigError: a rate is not strictly between 0 and 1.
    """
    for name, rate in (("trained_at", trained_at), ("world", world)):
        if not 0 < rate < 1:
            raise ConfigError(
                f"the positive rate is {rate:g}",
                where=name,
                fix="Give a rate strictly between 0 and 1",
            )
    scores = np.asarray(probability, dtype=np.float64)
    positive = scores * (world / trained_at)
    negative = (1 - scores) * ((1 - world) / (1 - trained_at))
    return np.asarray(positive / (positive + negative))


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> Reliability:
    """Mean prediction and share of positives in bins of (nearly) equal numbers of clips.

    Clips of equal score share a bin, so the answer does not depend on their order; bins that this
    leaves empty are dropped.

    Raises:
        RunError: a probability is not a number in 0..1.
    """
    scores, truth = _checked(probability, label)
    first_of_equals = np.searchsorted(np.sort(scores), scores, side="left")
    bin_of = first_of_equals * bins // max(len(scores), 1)
    clips = np.bincount(bin_of, minlength=bins)
    filled = clips > 0
    totals = (np.bincount(bin_of, weights=value, minlength=bins) for value in (scores, truth))
    predicted, observed = (total[filled] / clips[filled] for total in totals)
    return Reliability(predicted, observed, clips[filled])


def expected_calibration_error(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> float:
    """Mean distance, weighted by clips, of predicted from observed frequency over equal-mass bins.

    The estimator of Naeini, Cooper and Hauskrecht (AAAI 2015), on bins of equal mass rather than
    equal width: with rare positives most equal-width bins would be empty.

    Raises:
        RunError: a probability is not a number in 0..1.
    """
    predicted, observed, clips = reliability(probability, label, bins)
    return float(np.average(np.abs(predicted - observed), weights=clips))


def stratified_bootstrap(
    probability: ArrayLike,
    label: ArrayLike,
    threshold: float,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """MCC at a fixed threshold, and AUC, of clips redrawn with replacement within each class.

    Drawing clips and counting them by score is drawing the counts from a multinomial, so a resample
    costs no sort. AUC is the Mann-Whitney statistic, ties counted half.

    Returns:
        MCC [resamples] and AUC [resamples]; the same seed gives the same resamples.

    Raises:
        RunError: a probability is not a number in 0..1, or the labels hold one class only.
        ConfigError: the threshold is not a finite number.
    """
    _check_threshold(threshold)
    scores, truth = _checked(probability, label)
    thresholds, positives, negatives = _histograms(scores, truth)
    n_positive, n_negative = int(positives.sum()), int(negatives.sum())
    if n_positive == 0 or n_negative == 0:
        raise RunError("a bootstrap within classes needs clips of both classes")
    above = thresholds > threshold
    generator = np.random.default_rng(seed)
    auc = np.empty(resamples)
    counts = np.empty((4, resamples), dtype=np.int64)
    for draw in range(resamples):
        drawn_positives = generator.multinomial(n_positive, positives / n_positive)
        drawn_negatives = generator.multinomial(n_negative, negatives / n_negative)
        negatives_below = np.cumsum(drawn_negatives) - drawn_negatives / 2
        auc[draw] = drawn_positives @ negatives_below / (n_positive * n_negative)
        tp, fp = drawn_positives[above].sum(), drawn_negatives[above].sum()
        counts[:, draw] = n_negative - fp, fp, n_positive - tp, tp
    return _mcc(*counts), auc


def _check_threshold(threshold: float) -> None:
    # No number (NaN) would call no clip positive, and infinity neither.
    if not math.isfinite(threshold):
        raise ConfigError(f"{threshold} is not a probability", where="threshold")


def _checked(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Labels]:
    scores = np.asarray(probability, dtype=np.float64)
    truth = np.asarray(label).astype(np.int64)
    wrong = int(np.sum(~((scores >= 0) & (scores <= 1))))
    if wrong:
        raise RunError(
            f"{wrong} of {len(scores)} probabilities are not numbers between 0 and 1",
            fix="If the loss became NaN, resume before that with a lower learning rate",
        )
    return scores, truth


def _histograms(scores: Floats, truth: Labels) -> tuple[Floats, Labels, Labels]:
    """Distinct scores, ascending, and the positives and negatives that have each of them."""
    distinct, which = np.unique(scores, return_inverse=True)
    clips = np.bincount(which, minlength=len(distinct))
    positives = np.bincount(which[truth == 1], minlength=len(distinct))
    return distinct, positives, clips - positives


def _called_positive(scores: Floats, truth: Labels) -> tuple[Labels, Labels]:
    """Negatives and positives [K + 1] that are called positive, by threshold from high to low."""
    _, positives, negatives = _histograms(scores, truth)
    fp, tp = (np.append(0, np.cumsum(counts[::-1])) for counts in (negatives, positives))
    return fp, tp


def _mcc(tn: Labels, fp: Labels, fn: Labels, tp: Labels) -> Floats:
    """MCC from counts of any one shape.

    Not torchmetrics' ``binary_matthews_corrcoef``: as of 1.9 that gives 0.55, not 0, to a model
    which calls 97 negatives and 3 positives all negative.
    """
    a, b, c, d = (np.asarray(count, dtype=np.float64) for count in (tn, fp, fn, tp))
    scale = np.sqrt((d + b) * (d + c)) * np.sqrt((a + b) * (a + c))
    return np.asarray(np.divide(d * a - b * c, scale, out=np.zeros_like(scale), where=scale > 0))


def _accuracy(scores: Floats, truth: Labels) -> float:
    return float(np.mean((scores > 0.5) == truth))


def _area_under_roc(scores: Floats, truth: Labels) -> float:
    false_rate, true_rate = roc_curve(scores, truth)
    return float(np.trapezoid(true_rate, false_rate))


def _average_precision(scores: Floats, truth: Labels) -> float:
    recall, precision = precision_recall_curve(scores, truth)
    return float(np.diff(recall) @ precision[1:])


def _mcc_at(threshold: float) -> Callable[[Floats, Labels], float]:
    return lambda scores, truth: mcc(confusion(scores, truth, threshold))


class Metric(NamedTuple):
    """One figure of merit.

    Attributes:
        function: takes probabilities float64 [N] and labels int64 [N] in {0, 1}, N >= 1.
        higher_is_better: the direction that ``checkpoint.best`` looks in.
        needs_both_classes: undefined where the labels hold one class only.
    """

    function: Callable[[Floats, Labels], float]
    higher_is_better: bool
    needs_both_classes: bool = True


#: What is logged of training and of held-out clips, by name, in the order of the log.
METRICS: dict[str, Metric] = {
    **{f"mcc@{t}": Metric(_mcc_at(t), higher_is_better=True) for t in THRESHOLDS},
    "accuracy": Metric(_accuracy, higher_is_better=True, needs_both_classes=False),
    "auc": Metric(_area_under_roc, higher_is_better=True),
    "ap": Metric(_average_precision, higher_is_better=True),
}
