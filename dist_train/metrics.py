"""Metrics of a binary classifier of rare events, and Bayes' correction for another prior.

All functions take probabilities [N] in 0..1 and labels [N] in {0, 1}, as numpy arrays or CPU
tensors, and compute in float64. They raise ``RunError`` for a probability that is not in 0..1. A
clip is called positive if its probability is strictly greater than the threshold.
"""

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
    """Every metric of ``METRICS``, by name; None if undefined, as most are without clips of both
    classes."""
    scores, truth = _checked(probability, label)
    both_classes = 0 < truth.sum() < len(truth)
    return {
        name: float(metric.function(scores, truth))
        if len(truth) and (both_classes or not metric.needs_both_classes)
        else None
        for name, metric in METRICS.items()
    }


def roc_curve(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """Receiver operating characteristic of clips of both classes.

    Returns:
        False and true positive rates [K + 1] at every threshold, from high to low: both ascend from
        0 to 1. K is the number of distinct scores.
    """
    fp, tp = _called_positive(*_checked(probability, label))
    return fp / fp[-1], tp / tp[-1]


def precision_recall_curve(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """Recall and precision of clips of both classes.

    Average precision is the area under the steps, without interpolation: the sum of
    ``precision[k] * (recall[k] - recall[k - 1])``.

    Returns:
        Recall [K + 1] at every threshold, from high to low, ascending from 0 to 1; and precision
        [K + 1], 1 where no clip is called positive. K is the number of distinct scores.
    """
    fp, tp = _called_positive(*_checked(probability, label))
    return tp / tp[-1], np.append(1.0, tp[1:] / (tp + fp)[1:])


def confusion(probability: ArrayLike, label: ArrayLike, threshold: float) -> Confusion:
    """Counts at one threshold."""
    scores, truth = _checked(probability, label)
    tn, fp, fn, tp = np.bincount(2 * truth + (scores > threshold), minlength=4).tolist()
    return Confusion(tn, fp, fn, tp)


def mcc(counts: Confusion) -> float:
    """Matthews correlation coefficient; 0 if the model gives every clip the same class."""
    return float(_mcc(*(np.asarray(count) for count in counts)))


def mcc_curve(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """The exact MCC at every threshold.

    Returns:
        Thresholds [K], the distinct scores in ascending order, and MCC [K]: ``mcc[k]`` holds from
        ``thresholds[k]`` up to, but not including, ``thresholds[k + 1]``.
    """
    thresholds, positives, negatives = _histograms(*_checked(probability, label))
    fn, tn = np.cumsum(positives), np.cumsum(negatives)
    return thresholds, _mcc(tn, tn[-1] - tn, fn, fn[-1] - fn)


def best_threshold(probability: ArrayLike, label: ArrayLike) -> float:
    """A threshold of about the highest MCC.

    The very highest value often depends on a single clip: one positive scored at 0.002 can draw the
    threshold there, although every threshold up to 0.7 is as good for all that these clips can
    tell. So all thresholds within one standard error of the best count as equally good (the rule of
    Breiman, Friedman, Olshen and Stone, "Classification and Regression Trees", 1984), except those
    below half of the best. The answer is the middle of their widest interval.
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

    Bayes' rule with fixed class likelihoods: equation 4 of Saerens, Latinne and Decaestecker,
    "Adjusting the outputs of a classifier to new a priori probabilities", Neural Computation 14
    (2002). The order of the clips stays, and so do AUC, AP, 0 and 1.

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

    Clips of equal score share a bin, so their order does not matter. Empty bins are dropped.
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
    """Mean distance of predicted from observed frequency over bins, weighted by clips.

    The estimator of Naeini, Cooper and Hauskrecht (AAAI 2015), but on bins of equal numbers of
    clips: with rare positives most bins of equal width would be empty.
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

    The counts of drawn clips by score come from a multinomial, so a resample needs no sort. AUC is
    the Mann-Whitney statistic, with ties counted half.

    Returns:
        MCC [resamples] and AUC [resamples]; the same seed gives the same resamples.

    Raises:
        RunError: the labels are of one class only.
    """
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
    """Distinct scores, ascending, and the numbers of positives and negatives of each."""
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
    """MCC from counts of the same shape.

    Not torchmetrics' ``binary_matthews_corrcoef``, whose version 1.9 gives 0.55, not 0, to a model
    that calls 97 negatives and 3 positives all negative.
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
    """One metric.

    Attributes:
        function: takes probabilities float64 [N] and labels int64 [N] in {0, 1}, N >= 1.
        higher_is_better: the direction for ``checkpoint.best``.
        needs_both_classes: undefined if all labels are of one class.
    """

    function: Callable[[Floats, Labels], float]
    higher_is_better: bool
    needs_both_classes: bool = True


#: The logged metrics of training and held-out clips, by name, in the order of the log.
METRICS: dict[str, Metric] = {
    **{f"mcc@{t}": Metric(_mcc_at(t), higher_is_better=True) for t in THRESHOLDS},
    "accuracy": Metric(_accuracy, higher_is_better=True, needs_both_classes=False),
    "auc": Metric(_area_under_roc, higher_is_better=True),
    "ap": Metric(_average_precision, higher_is_better=True),
}
