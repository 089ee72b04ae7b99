"""Intervals of a metric of variants, by a bootstrap over clips and trials at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_train.metrics import METRICS, THRESHOLDS, Confusion, Floats, Labels, mcc
from dist_train.sweep.settings import FITTED

Texts = NDArray[np.object_]


class Sample(NamedTuple):
    """The held-out clips of a trial that its metric is of.

    Attributes:
        run: (seed, fold) of the trial.
        keys: names of the clips [N].
        labels: int64 [N] in {0, 1}; of other targets as ``Target.truth``.
        scores: float64 [N]; not of other targets.
        threshold: of ``FITTED``; None for other metrics.
        measure: of other targets, the metric of the clips at some places, one or more.
    """

    variant: str
    run: tuple[int, int]
    keys: Texts
    labels: NDArray[Any]
    scores: Floats
    threshold: float | None
    measure: Callable[[Labels], float | None] | None = None


def resampled(
    samples: Sequence[Sample], metric: str, *, draws: int = 1000, seed: int = 0
) -> dict[str, Floats]:
    """The mean of a metric over the trials of each variant, of clips and trials redrawn.

    Each draw redraws the clips, within each class or combination of labels, and the pairs of seed
    and fold, both with replacement, and independently of each other (the pigeonhole bootstrap:
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007). A clip or pair counts
    as often in all trials of all variants, so that variants can be compared draw by draw.

    Returns:
        [draws] by variant; NaN where a draw has no trial of which the metric is defined, as it is
        not of two classes without clips of both.
    """
    names = np.unique(np.concatenate([sample.keys for sample in samples]))
    places = [np.searchsorted(names, sample.keys) for sample in samples]
    truth = np.zeros((len(names), *samples[0].labels.shape[1:]), samples[0].labels.dtype)
    for sample, place in zip(samples, places, strict=True):
        truth[place] = sample.labels
    strata = np.zeros(len(names), np.int64)
    # Values are not redrawn within each.
    if truth.dtype.kind != "f":
        strata = np.unique(truth, axis=0, return_inverse=True)[1].reshape(-1)
    runs = sorted({sample.run for sample in samples})
    run_of = [runs.index(sample.run) for sample in samples]
    functions = [_of_counts(sample, metric) for sample in samples]
    variants = list(dict.fromkeys(sample.variant for sample in samples))
    of_variant = np.array([variants.index(sample.variant) for sample in samples])
    members = [np.flatnonzero(strata == stratum) for stratum in range(strata.max(initial=-1) + 1)]
    generator = np.random.default_rng(seed)
    found = np.full((len(variants), draws), np.nan)
    counts = np.zeros(len(names), np.int64)
    for draw in range(draws):
        for clips in members:
            counts[clips] = _redrawn(generator, len(clips))
        weights = _redrawn(generator, len(runs))[run_of].astype(np.float64)
        values = np.array(
            [
                function(counts[place]) if weight else np.nan
                for function, place, weight in zip(functions, places, weights, strict=True)
            ]
        )
        weights[np.isnan(values)] = 0
        total = np.bincount(of_variant, weights, len(variants))
        summed = np.bincount(of_variant, weights * np.nan_to_num(values), len(variants))
        np.divide(summed, total, out=found[:, draw], where=total > 0)
    return dict(zip(variants, found, strict=True))


def _redrawn(generator: np.random.Generator, number: int) -> Labels:
    """How often each of ``number`` is drawn in as many draws."""
    return np.bincount(generator.integers(number, size=number), minlength=number)


def _of_counts(sample: Sample, metric: str) -> Callable[[Labels], float]:
    """The metric of a sample by how often each clip counts; NaN if it is not defined."""
    if (measure := sample.measure) is not None:

        def measured(counts: Labels) -> float:
            clips = np.repeat(np.arange(len(counts)), counts)
            value = measure(clips) if len(clips) else None
            return np.nan if value is None else value

        return measured
    name = metric.partition("/")[2]
    fixed = {f"mcc@{threshold}": threshold for threshold in THRESHOLDS}
    threshold = sample.threshold if metric == FITTED else fixed.get(name)
    labels, scores = sample.labels, sample.scores
    if threshold is not None:
        cells = 2 * labels + (scores > threshold)

        def at_threshold(counts: Labels) -> float:
            confusion = np.bincount(cells, counts, minlength=4)
            if not confusion[:2].any() or not confusion[2:].any():
                return np.nan
            return mcc(Confusion(*confusion.astype(np.int64).tolist()))

        return at_threshold

    function = METRICS[name].function

    def of_clips(counts: Labels) -> float:
        clips = np.repeat(np.arange(len(labels)), counts)
        if not 0 < labels[clips].sum() < len(clips):
            return np.nan
        return float(function(scores[clips], labels[clips]))

    return of_clips


def value_of(sample: Sample, metric: str) -> float:
    """The metric of a trial, each clip once; NaN if it is not defined."""
    return _of_counts(sample, metric)(np.ones(len(sample.labels), np.int64))


def interval(draws: Floats) -> tuple[float, float]:
    """The middle 95 % of the draws; NaN if none is defined."""
    if np.isnan(draws).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def share_above(draws: Floats, others: Floats) -> float:
    """The share of draws in which the first is above the second; ties count half."""
    both = ~(np.isnan(draws) | np.isnan(others))
    if not both.any():
        return np.nan
    apart = np.sign(draws[both] - others[both])
    return float((1 + apart.mean()) / 2)
