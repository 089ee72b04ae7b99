"""Means, intervals and orders against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from dist_train.sweep.intervals import Sample, interval, resampled, share_above, value_of


def sample(variant: str, run: tuple[int, int], *, noise: float, clips: range) -> Sample:
    """Scores of clips with these numbers; a third are positive."""
    random = np.random.default_rng([*run, int(noise * 100)])
    numbers = np.array(clips)
    labels = (numbers % 3 == 0).astype(np.int64)
    scores = 1 / (1 + np.exp(-(2 * labels - 1 + noise * random.normal(size=len(labels)))))
    keys = np.array([f"clip{number:04}" for number in numbers], object)
    return Sample(variant, run, keys, labels, scores, 0.6)


METRICS = {
    "test/mcc@0.5": lambda labels, scores: matthews_corrcoef(labels, scores > 0.5),
    "test/mcc": lambda labels, scores: matthews_corrcoef(labels, scores > 0.6),
    "val/auc": roc_auc_score,
}


@pytest.mark.parametrize("metric", METRICS)
def test_the_metric_of_a_trial(metric: str) -> None:
    one = sample("a", (0, 0), noise=1.5, clips=range(100))
    assert value_of(one, metric) == pytest.approx(METRICS[metric](one.labels, one.scores))


@pytest.mark.parametrize("metric", METRICS)
def test_draws_against_plain_numpy(metric: str) -> None:
    """Two variants, three runs with overlapping clips: each draw computed clip by clip."""
    samples = [
        sample(variant, (seed, 0), noise=noise, clips=range(20 * seed, 20 * seed + 45))
        for variant, noise in (("a", 1.0), ("b", 3.0))
        for seed in range(3)
    ]
    draws = resampled(samples, metric, draws=20, seed=7)
    generator = np.random.default_rng(7)
    keys = sorted({str(key) for one in samples for key in one.keys})
    label = {str(k): int(v) for one in samples for k, v in zip(one.keys, one.labels, strict=True)}
    for draw in range(20):
        times = {}
        for code in (0, 1):
            own = [key for key in keys if label[key] == code]
            drawn = generator.integers(len(own), size=len(own))
            times |= {key: int((drawn == place).sum()) for place, key in enumerate(own)}
        runs = generator.integers(3, size=3)
        for variant, found in draws.items():
            values = []
            for run in runs:
                one = next(s for s in samples if s.variant == variant and s.run == (run, 0))
                places = [n for n, key in enumerate(one.keys) for _ in range(times[str(key)])]
                values.append(METRICS[metric](one.labels[places], one.scores[places]))
            assert found[draw] == pytest.approx(np.mean(values))


def test_an_interval_holds_the_truth_and_an_order_is_told() -> None:
    samples = [
        sample(variant, (seed, 0), noise=noise, clips=range(150))
        for variant, noise in (("a", 0.8), ("b", 2.5), ("c", 2.5))
        for seed in range(3)
    ]
    draws = resampled(samples, "test/mcc@0.5")
    low, high = interval(draws["b"])
    mean = np.mean([value_of(one, "test/mcc@0.5") for one in samples if one.variant == "b"])
    assert low < mean < high
    assert 0.1 < high - low < 0.5
    assert share_above(draws["a"], draws["b"]) > 0.99
    assert share_above(draws["b"], draws["b"]) == 0.5
    assert 0.02 < share_above(draws["b"], draws["c"]) < 0.98


def of_values(variant: str, seed: int, *, noise: float) -> Sample:
    """Predictions of the values of 60 clips."""
    random = np.random.default_rng([seed, int(noise * 100)])
    keys = np.array([f"clip{number:02}" for number in range(60)], object)
    truth = np.random.default_rng(0).normal(size=(60, 1))
    error = np.abs(noise * random.normal(size=60))
    return Sample(variant, (seed, 0), keys, truth, truth, None, lambda at: float(error[at].mean()))


def test_draws_of_another_kind_are_of_its_own_measure() -> None:
    samples = [of_values(variant, seed, noise=noise)
               for variant, noise in (("a", 1.0), ("b", 2.0)) for seed in range(3)]  # fmt: skip
    draws = resampled(samples, "test/mae", draws=200)
    low, high = interval(draws["a"])
    assert low < np.mean([value_of(one, "test/mae") for one in samples[:3]]) < high
    assert share_above(draws["b"], draws["a"]) > 0.99
    # The same clips are drawn as by hand.
    generator = np.random.default_rng(0)
    times = np.bincount(generator.integers(60, size=60), minlength=60)
    runs = generator.integers(3, size=3)
    by_hand = np.mean([samples[run].measure(np.repeat(np.arange(60), times)) for run in runs])
    assert draws["a"][0] == pytest.approx(by_hand)


def test_classes_are_redrawn_within_each() -> None:
    """So the share of each stays in all draws."""
    labels = np.repeat([0, 1, 2], [4, 8, 20])
    keys = np.array([f"clip{number:02}" for number in range(32)], object)

    def share(at: np.ndarray) -> float:
        return float(np.mean(labels[at] == 1))

    one = Sample("a", (0, 0), keys, labels, np.zeros(32), None, share)
    assert np.unique(resampled([one], "test/mcc", draws=50)["a"]).tolist() == [0.25]


def test_draws_without_both_classes_do_not_count() -> None:
    """The only positive is drawn in two thirds of the draws or so."""
    one = sample("a", (0, 0), noise=1.0, clips=range(4))._replace(labels=np.array([1, 0, 0, 0]))
    other = sample("b", (0, 0), noise=1.0, clips=range(30))
    draws = resampled([one, other], "test/auc", draws=200)["a"]
    assert 0 < np.isnan(draws).sum() < 200
    assert not np.isnan(interval(draws)).any()
    assert np.isnan(interval(np.full(3, np.nan))).all()
