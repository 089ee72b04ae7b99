"""What gives the label away without looking at the pixels.

A classifier that sees only how a clip was recorded (its depth, size, group, brightness...) should
do no better than chance. Where it does better, a network can reach the same score by the same
shortcut. Each column is tried alone and all are tried together, by gradient boosting of decision
trees (Friedman 2001) with predictions out of fold.

Where there are groups, folds keep them apart, so that a column does not pass for its group. The
group itself is tried in folds that mix groups.

Of more than two classes each is told from the rest; of labels each by itself. Values are predicted
as values, and judged by ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import TargetEncoder

from dist_train import metrics
from dist_train.data.check.result import Leak
from dist_train.metrics import Floats, Labels

FOLDS = 5
#: With fewer clips of a class than this, every interval reaches from none to nearly all.
FEWEST = 20
#: MCC, or rank correlation, below which a leak is not worth a warning, however certain it is.
NEGLIGIBLE = 0.05
#: Standard deviations of chance that a leak exceeds. They are those of fixed predictions. Of two
#: like clips in different folds each is predicted by the other's label, so both are right by
#: chance, or both are wrong: the real deviation is up to sqrt(2) larger (1.34 on 240 columns that
#: are unrelated to the label). So these are 3.5 real ones.
CERTAIN = 5.0
#: The same where groups are the units, whose test is stricter by itself.
CERTAIN_OF_GROUPS = 4.0
GROUP = "group"
#: Parts of the order of values that folds have equal shares of.
QUANTILES = 10
TargetType = Literal["binary", "multiclass", "continuous"]
Array = NDArray[Any]
_RESAMPLES = 1000
_TREES: dict[str, Any] = {
    "max_iter": 60, "max_leaf_nodes": 8, "min_samples_leaf": 10, "early_stopping": False,
}  # fmt: skip


def find_leaks(
    columns: pd.DataFrame, labels: Mapping[str, Array], *, seed: int = 0, alone: bool = True
) -> list[Leak]:
    """Try each column alone, and all together.

    A leak has an MCC, or a rank correlation, of ``NEGLIGIBLE`` at least, which chance would not
    give (``CERTAIN``; the more labels are tried, the rarer it must be, by Bonferroni's rule).

    Args:
        columns: one row per clip; numbers, or texts, which are categories. NaN is a value. The
            column ``GROUP``, if there is one, is also what folds keep apart.
        labels: what is to be told from the columns, by name: 0 or 1, int64 [N]; or values, float64
            [N]. What ``can_be_tried`` denies is not.
        alone: also try each column alone, not only the group.

    Returns:
        One ``Leak`` per column that has two values or more, the best first; then that of all
        columns, if there are several. Of several labels it is that of the label that is told best.
    """
    tried = {name: label for name, label in labels.items() if can_be_tried(label)}
    each = [
        _leaks_of(columns, name if len(labels) > 1 else "", label, len(tried), seed, alone)
        for name, label in tried.items()
    ]
    # All together may be one column for some labels, and then is not there.
    best = [
        max(filter(None, same), key=lambda leak: (leak.is_leak, leak.score))
        for same in zip_longest(*each)
    ]
    single = [leak for leak in best if len(leak.columns) == 1]
    together = [leak for leak in best if len(leak.columns) > 1]
    return sorted(single, key=lambda leak: -leak.score) + together


def can_be_tried(label: Array) -> bool:
    """Whether there are ``FEWEST`` clips with a label, and without; or with a value, and several
    values."""
    if label.dtype.kind == "f":
        return len(label) >= FEWEST and bool(np.ptp(label) > 0)
    return bool(np.bincount(label, minlength=2).min() >= FEWEST)


def _leaks_of(
    columns: pd.DataFrame, name: str, label: Array, tests: int, seed: int, alone: bool
) -> list[Leak]:
    """The leaks of one label: those of columns, and that of all together, in their order."""
    strata = _strata(label)
    mixed = _folds(strata, None, seed)
    assert mixed is not None
    groups = apart = None
    if GROUP in columns:
        groups = pd.factorize(columns[GROUP])[0]
        apart = _folds(strata, groups, seed)
    varied = [str(column) for column in columns if columns[column].nunique(dropna=False) > 1]
    # In folds that keep groups apart, the group says nothing.
    several = [column for column in varied if apart is None or column != GROUP]
    sets = [[column] for column in varied if alone or column == GROUP]
    sets += [several] if len(several) > 1 else []
    leaks = []
    for names in sets:
        own = None if names == [GROUP] else apart
        called = _out_of_fold(columns[names], label, mixed if own is None else own, seed)
        leaks.append(_judged(called, label, mixed, None if own is None else groups, tests, seed,
                             columns=names, of=name))  # fmt: skip
    return leaks


def _strata(label: Array) -> Labels:
    """What folds have equal shares of: classes, or parts of the order of values."""
    if label.dtype.kind != "f":
        return label
    parts = min(QUANTILES, len(label) // (2 * FOLDS))
    return np.argsort(np.argsort(label, kind="stable")) * parts // len(label)


def _folds(strata: Labels, groups: Labels | None, seed: int) -> Labels | None:
    """The fold of each clip; None if groups are too few, or too uneven, to be kept apart."""
    fold = np.empty(len(strata), np.int64)
    if groups is None:
        kind: Any = StratifiedKFold
    elif len(np.unique(groups)) < FOLDS:
        return None
    else:
        kind = StratifiedGroupKFold
    cut = kind(FOLDS, shuffle=True, random_state=seed).split(strata, strata, groups)
    for number, (train, test) in enumerate(cut):
        fold[test] = number
        if not len(test) or min(np.bincount(strata[train], minlength=2)) < FOLDS:
            return None
    return fold


def _out_of_fold(columns: pd.DataFrame, label: Array, fold: Labels, seed: int) -> Array:
    """Which clips are called positive by models and thresholds of the other folds, 0 or 1; or their
    values."""
    is_value = label.dtype.kind == "f"
    scores = np.empty(len(label))
    for number in range(FOLDS):
        own = fold == number
        model = _model(columns, is_value, seed).fit(columns[~own], label[~own])
        scores[own] = (
            model.predict(columns[own]) if is_value else model.predict_proba(columns[own])[:, 1]
        )
    if is_value:
        return scores
    called = np.empty(len(label), np.int64)
    for number in range(FOLDS):
        own = fold == number
        thresholds, values = metrics.mcc_curve(scores[~own], label[~own])
        called[own] = scores[own] > thresholds[int(values.argmax())]
    return called


def _judged(
    called: Array, label: Array, mixed: Labels, groups: Labels | None, tests: int, seed: int,
    *, columns: list[str], of: str,
) -> Leak:  # fmt: skip
    if label.dtype.kind == "f":
        called, label = rankdata(called), rankdata(label)
        score, draws = _correlations(called, label, groups, seed)
    else:
        score, draws = _mccs(called, label, groups, seed)
    certain, of_groups = limits(tests)
    is_certain = _within(called, label, mixed if groups is None else groups) >= certain
    if groups is not None:
        is_certain |= _between(called, label, groups) >= of_groups
    # As many intervals hold at once.
    low, high = np.percentile(draws, [2.5 / tests, 100 - 2.5 / tests])
    is_value = label.dtype.kind == "f"
    return Leak(
        columns=columns,
        of=of,
        mcc=None if is_value else score,
        rank_correlation=score if is_value else None,
        low=float(low),
        high=float(high),
        clips=len(label),
        apart=groups is not None,
        is_leak=score >= NEGLIGIBLE and is_certain,
    )


def limits(tests: int) -> tuple[float, float]:
    """``CERTAIN`` and ``CERTAIN_OF_GROUPS`` for each of ``tests`` labels: higher, so that chance
    exceeds them for any label as rarely as the two for a single one (Bonferroni)."""
    real = float(norm.isf(norm.sf(CERTAIN / math.sqrt(2)) / tests))
    return math.sqrt(2) * real, math.sqrt(CERTAIN_OF_GROUPS**2 + 2 * math.log(tests))


def _mccs(called: Labels, label: Labels, groups: Labels | None, seed: int) -> tuple[float, Floats]:
    """The MCC, and its draws of a bootstrap over groups, or over clips within each class."""
    # Counts of true and false negatives and positives.
    outcome = 2 * called + (called == label)
    mcc = _mcc_of(np.bincount(outcome, minlength=4))
    if groups is None:
        return mcc, metrics.stratified_bootstrap(called, label, 0.5, seed=seed)[0]
    by_group = np.zeros((groups.max() + 1, 4), np.int64)
    np.add.at(by_group, (groups, outcome), 1)
    return mcc, np.array([_mcc_of(counts) for counts in _redrawn(len(by_group), seed) @ by_group])


def _correlations(
    called: Floats, label: Floats, groups: Labels | None, seed: int
) -> tuple[float, Floats]:
    """The correlation of ranks, and its draws of a bootstrap over groups, or over clips. The ranks
    are those among all clips in each draw."""
    a, b = called - called.mean(), label - label.mean()
    sums = np.stack([np.ones(len(a)), a, b, a * a, b * b, a * b], axis=1)

    def of(moments: Array) -> Floats:
        count, x, y, xx, yy, xy = moments.T.astype(np.float64)
        spread = np.sqrt((count * xx - x * x).clip(min=0) * (count * yy - y * y).clip(min=0))
        found: Floats = np.zeros(len(count))
        np.divide(count * xy - x * y, spread, out=found, where=spread > 1e-9)
        return found

    score = float(of(sums.sum(axis=0)[None])[0])
    if groups is None:
        random = np.random.default_rng(seed)
        times = (np.bincount(random.integers(len(a), size=len(a)), minlength=len(a))
                 for _ in range(_RESAMPLES))  # fmt: skip
        return score, of(np.array([one @ sums for one in times]))
    by_group = np.zeros((groups.max() + 1, sums.shape[1]))
    np.add.at(by_group, groups, sums)
    return score, of(_redrawn(len(by_group), seed) @ by_group)


def _redrawn(groups: int, seed: int) -> Labels:
    """How often each group is in each draw, int64 [draws, groups]."""
    random = np.random.default_rng(seed)
    return random.multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)


def _mcc_of(outcomes: Labels) -> float:
    fn, tn, fp, tp = outcomes.tolist()
    return metrics.mcc(metrics.Confusion(tn, fp, fn, tp))


def _within(called: Array, label: Array, strata: Labels) -> float:
    """Agreement of calls, or ranks, and labels within strata, in standard deviations of chance.

    The test of Mantel and Haenszel (1959), and of 0 and 1 or of ranks by the same formula Mantel's
    (1963): in each stratum the labels are shuffled. With one stratum it is about sqrt(N) x MCC.
    """
    n, c, p, cc, pp, both = (
        np.bincount(strata, weights=weight).astype(np.float64)
        for weight in (np.ones(len(label)), called, label, called**2, label**2, called * label)
    )
    variance = (cc - c**2 / n).clip(min=0) * (pp - p**2 / n).clip(min=0) / (n - 1).clip(min=1)
    return float((both - p * c / n).sum() / max(math.sqrt(variance.sum()), 1e-9))


def _between(called: Array, label: Array, groups: Labels) -> float:
    """Agreement of calls and labels, in standard deviations of chance if groups are the units.

    The sum of the groups' covariances by the root of the sum of their squares: where chance gives
    either sign to a group, it exceeds x with a probability of exp(-x^2 / 2) at most (Efron 1969).
    """
    agreement: Floats = (called - called.mean()) * (label - label.mean())
    by_group = np.bincount(groups, weights=agreement)
    return float(by_group.sum() / max(math.sqrt((by_group**2).sum()), 1e-9))


def _model(columns: pd.DataFrame, is_value: bool, seed: int) -> Pipeline:
    if is_value:
        numbers = as_numbers(columns, seed, "continuous")
        return make_pipeline(numbers, boosting_of_values(seed))
    return make_pipeline(as_numbers(columns, seed), boosting(seed))


def boosting(seed: int, class_weight: str | None = None) -> HistGradientBoostingClassifier:
    """Gradient boosting of few small trees."""
    return HistGradientBoostingClassifier(**_TREES, random_state=seed, class_weight=class_weight)


def boosting_of_values(seed: int) -> HistGradientBoostingRegressor:
    """The same, to predict values."""
    return HistGradientBoostingRegressor(**_TREES, random_state=seed)


def as_numbers(
    columns: pd.DataFrame, seed: int, target_type: TargetType = "binary"
) -> ColumnTransformer:
    """What turns columns of texts into numbers: a category becomes the share of positives, or of
    each class, among its clips, of other folds; or the mean of their values."""
    texts = [name for name in columns if not pd.api.types.is_numeric_dtype(columns[name])]
    folds = StratifiedKFold if target_type == "binary" else KFold
    encoder = TargetEncoder(
        target_type=target_type, cv=folds(FOLDS, shuffle=True, random_state=seed)
    )
    return ColumnTransformer([("texts", encoder, texts)], remainder="passthrough")
