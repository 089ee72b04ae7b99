"""What gives the label away without looking at the pixels.

A classifier that sees only how a clip was recorded (its depth, size, group, brightness...) should
do no better than chance. Where it does better, a network can reach the same score by the same
shortcut. Each column is tried alone and all are tried together, by gradient boosting of decision
trees (Friedman 2001) with predictions out of fold.

Where there are groups, folds keep them apart, so that a column does not pass for its group. The
group itself is tried in folds that mix groups.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import TargetEncoder

from dist_train import metrics
from dist_train.data.check.result import Leak
from dist_train.metrics import Floats, Labels

FOLDS = 5
#: With fewer clips of a class than this, every interval reaches from none to nearly all.
FEWEST = 20
#: MCC below which a leak is not worth a warning, however certain it is.
NEGLIGIBLE = 0.05
#: Standard deviations of chance that a leak exceeds. They are those of fixed predictions. Of two
#: like clips in different folds each is predicted by the other's label, so both are right by
#: chance, or both are wrong: the real deviation is up to sqrt(2) larger (1.34 on 240 columns that
#: are unrelated to the label). So these are 3.5 real ones.
CERTAIN = 5.0
#: The same where groups are the units, whose test is stricter by itself.
CERTAIN_OF_GROUPS = 4.0
GROUP = "group"
_RESAMPLES = 1000


def find_leaks(
    columns: pd.DataFrame, label: Labels, *, seed: int = 0, alone: bool = True
) -> list[Leak]:
    """Try each column alone, and all together.

    A leak has an MCC of ``NEGLIGIBLE`` at least, which chance would not give (``CERTAIN``).

    Args:
        columns: one row per clip; numbers, or texts, which are categories. NaN is a value. The
            column ``GROUP``, if there is one, is also what folds keep apart.
        label: 0 or 1, int64 [N].
        alone: also try each column alone, not only the group.

    Returns:
        One ``Leak`` per column that has two values or more, the best first; then that of all
        columns, if there are several. Empty if a class has fewer than ``FEWEST`` clips.
    """
    if min(np.bincount(label, minlength=2)) < FEWEST:
        return []
    mixed = _folds(label, None, seed)
    assert mixed is not None
    groups = apart = None
    if GROUP in columns:
        groups = pd.factorize(columns[GROUP])[0]
        apart = _folds(label, groups, seed)
    varied = [str(name) for name in columns if columns[name].nunique(dropna=False) > 1]
    # In folds that keep groups apart, the group says nothing.
    several = [name for name in varied if apart is None or name != GROUP]
    single = [[name] for name in varied if alone or name == GROUP]
    sets = single + ([several] if len(several) > 1 else [])
    leaks = []
    for names in sets:
        own = None if names == [GROUP] else apart
        called = _out_of_fold(columns[names], label, mixed if own is None else own, seed)
        leaks.append(_judged(names, called, label, mixed, None if own is None else groups, seed))
    return sorted(leaks[: len(single)], key=lambda leak: -leak.mcc) + leaks[len(single) :]


def _folds(label: Labels, groups: Labels | None, seed: int) -> Labels | None:
    """The fold of each clip; None if groups are too few, or too uneven, to be kept apart."""
    fold = np.empty(len(label), np.int64)
    if groups is None:
        kind: Any = StratifiedKFold
    elif len(np.unique(groups)) < FOLDS:
        return None
    else:
        kind = StratifiedGroupKFold
    cut = kind(FOLDS, shuffle=True, random_state=seed).split(label, label, groups)
    for number, (train, test) in enumerate(cut):
        fold[test] = number
        if not len(test) or min(np.bincount(label[train], minlength=2)) < FOLDS:
            return None
    return fold


def _out_of_fold(columns: pd.DataFrame, label: Labels, fold: Labels, seed: int) -> Labels:
    """Which clips are called positive by models and thresholds of the other folds, 0 or 1."""
    probability = np.empty(len(label))
    for number in range(FOLDS):
        own = fold == number
        model = _classifier(columns, seed).fit(columns[~own], label[~own])
        probability[own] = model.predict_proba(columns[own])[:, 1]
    called = np.empty(len(label), np.int64)
    for number in range(FOLDS):
        own = fold == number
        thresholds, values = metrics.mcc_curve(probability[~own], label[~own])
        called[own] = probability[own] > thresholds[int(values.argmax())]
    return called


def _judged(
    names: list[str], called: Labels, label: Labels, mixed: Labels, groups: Labels | None, seed: int
) -> Leak:
    # Counts of true and false negatives and positives.
    outcome = 2 * called + (called == label)
    if groups is None:
        draws, _ = metrics.stratified_bootstrap(called, label, 0.5, seed=seed)
    else:
        by_group = np.zeros((groups.max() + 1, 4), np.int64)
        np.add.at(by_group, (groups, outcome), 1)
        drawn = np.random.default_rng(seed).multinomial(
            len(by_group), np.full(len(by_group), 1 / len(by_group)), _RESAMPLES
        )
        draws = np.array([_mcc_of(counts) for counts in drawn @ by_group])
    mcc = _mcc_of(np.bincount(outcome, minlength=4))
    certain = _within(called, label, mixed if groups is None else groups) >= CERTAIN
    if groups is not None:
        certain |= _between(called, label, groups) >= CERTAIN_OF_GROUPS
    low, high = np.percentile(draws, [2.5, 97.5])
    return Leak(
        columns=names,
        mcc=mcc,
        low=float(low),
        high=float(high),
        clips=len(label),
        apart=groups is not None,
        is_leak=mcc >= NEGLIGIBLE and certain,
    )


def _mcc_of(outcomes: Labels) -> float:
    fn, tn, fp, tp = outcomes.tolist()
    return metrics.mcc(metrics.Confusion(tn, fp, fn, tp))


def _within(called: Labels, label: Labels, strata: Labels) -> float:
    """Agreement of calls and labels within strata, in standard deviations of chance.

    The test of Mantel and Haenszel (1959). With one stratum it is about sqrt(N) x MCC.
    """
    n, p, c, both = (
        np.bincount(strata, weights=weight).astype(np.float64)
        for weight in (np.ones(len(label)), label, called, called * label)
    )
    variance = p * (n - p) * c * (n - c) / (n**2 * (n - 1).clip(min=1))
    return float((both - p * c / n).sum() / max(math.sqrt(variance.sum()), 1e-9))


def _between(called: Labels, label: Labels, groups: Labels) -> float:
    """Agreement of calls and labels, in standard deviations of chance if groups are the units.

    The sum of the groups' covariances by the root of the sum of their squares: where chance gives
    either sign to a group, it exceeds x with a probability of exp(-x^2 / 2) at most (Efron 1969).
    """
    agreement: Floats = (called - called.mean()) * (label - label.mean())
    by_group = np.bincount(groups, weights=agreement)
    return float(by_group.sum() / max(math.sqrt((by_group**2).sum()), 1e-9))


def _classifier(columns: pd.DataFrame, seed: int) -> Pipeline:
    return make_pipeline(as_numbers(columns, seed), boosting(seed))


def boosting(seed: int, class_weight: str | None = None) -> HistGradientBoostingClassifier:
    """Gradient boosting of few small trees."""
    return HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=8, min_samples_leaf=10, early_stopping=False, random_state=seed,
        class_weight=class_weight,
    )  # fmt: skip


def as_numbers(columns: pd.DataFrame, seed: int) -> ColumnTransformer:
    """What turns columns of texts into numbers: a category becomes the share of positives among its
    clips, of other folds."""
    texts = [name for name in columns if not pd.api.types.is_numeric_dtype(columns[name])]
    encoder = TargetEncoder(
        target_type="binary", cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    )
    return ColumnTransformer([("texts", encoder, texts)], remainder="passthrough")
