"""Golden values are worked out by hand; the comments show the counts."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_matthews_corrcoef,
    binary_precision_recall_curve,
    binary_roc,
)

from dist_train.errors import ConfigError, RunError
from dist_train.metrics import (
    Confusion,
    best_threshold,
    binary_metrics,
    confusion,
    expected_calibration_error,
    mcc,
    mcc_curve,
    precision_recall_curve,
    prior_correct,
    reliability,
    roc_curve,
    stratified_bootstrap,
)

# Six clips, three of each class. Of the nine pairs (positive, negative) seven are in order.
SCORES = np.array([0.9, 0.65, 0.45, 0.55, 0.3, 0.1])
LABELS = np.array([1, 0, 1, 1, 0, 0])


def drawn(seed: int, clips: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and labels that follow them."""
    generator = np.random.default_rng(seed)
    scores = generator.random(clips).round(2)
    return scores, (generator.random(clips) < scores).astype(np.int64)


def test_metrics_of_six_clips() -> None:
    assert binary_metrics(SCORES, LABELS) == pytest.approx(
        {
            "mcc@0.4": 6 / np.sqrt(4 * 3 * 3 * 2),  # tp 3, fp 1, fn 0, tn 2
            "mcc@0.5": 3 / 9,  # tp 2, fp 1, fn 1, tn 2
            "mcc@0.6": 0,  # tp 1, fp 1, fn 2, tn 2
            "mcc@0.7": 3 / np.sqrt(1 * 3 * 3 * 5),  # tp 1, fp 0, fn 2, tn 3
            "accuracy": 4 / 6,
            "auc": 7 / 9,
            "ap": (1 / 1 + 2 / 3 + 3 / 4) / 3,
        }
    )


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_all_but_accuracy_undefined(label: int) -> None:
    metrics = binary_metrics([0.2, 0.9, 0.1, 0.3], [label] * 4)
    assert metrics.pop("accuracy") == (0.25 if label else 0.75)
    assert set(metrics.values()) == {None}
    assert set(binary_metrics([], []).values()) == {None}


@pytest.mark.parametrize("score", [-0.1, 1.5, np.nan])
def test_what_is_not_a_probability_is_refused(score: float) -> None:
    with pytest.raises(RunError, match="1 of 2 probabilities"):
        binary_metrics([0.5, score], [0, 1])


def test_a_score_at_the_threshold_is_negative() -> None:
    assert confusion([0.5, 0.5, 0.6], [0, 1, 1], 0.5) == Confusion(tn=1, fp=0, fn=1, tp=1)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_mcc_of_a_model_without_opinion_is_zero(score: float) -> None:
    assert mcc(confusion(np.full(100, score), np.arange(100) < 3, 0.5)) == 0


def test_mcc_agrees_with_torchmetrics_where_both_classes_are_called() -> None:
    for seed in range(20):
        scores, labels = drawn(seed)
        theirs = binary_matthews_corrcoef(torch.tensor(scores), torch.tensor(labels), 0.3)
        assert mcc(confusion(scores, labels, 0.3)) == pytest.approx(float(theirs), abs=1e-6)


def test_areas_and_curves_agree_with_torchmetrics() -> None:
    """Rounded scores have ties."""
    for seed in range(20):
        scores, labels = drawn(seed)
        scores = np.round(scores, seed % 3 + 1)
        tensors = torch.tensor(scores), torch.tensor(labels)
        found = binary_metrics(*tensors)
        assert found["auc"] == pytest.approx(float(binary_auroc(*tensors)), abs=1e-6)
        assert found["ap"] == pytest.approx(float(binary_average_precision(*tensors)), abs=1e-6)
        false_rate, true_rate, _ = binary_roc(*tensors)
        for mine, theirs in zip(roc_curve(scores, labels), (false_rate, true_rate), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
        precision, recall, _ = binary_precision_recall_curve(*tensors)
        curve = precision_recall_curve(scores, labels)
        for mine, theirs in zip(curve, (recall.flip(0), precision.flip(0)), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_curve_holds_from_each_score_to_the_next() -> None:
    scores, labels = drawn(3)
    thresholds, values = mcc_curve(scores, labels)
    assert thresholds.tolist() == sorted(set(scores.tolist()))
    inside = np.append((thresholds[:-1] + thresholds[1:]) / 2, 1.0)
    for threshold, middle, value in zip(thresholds, inside, values, strict=True):
        assert mcc(confusion(scores, labels, threshold)) == pytest.approx(value)
        assert mcc(confusion(scores, labels, middle)) == pytest.approx(value)


def test_best_threshold_is_the_middle_of_the_gap_between_the_classes() -> None:
    assert best_threshold([0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1]) == pytest.approx(0.4)


def test_best_threshold_takes_the_widest_of_equal_intervals() -> None:
    # Above 0.1: tp 2, fp 1, fn 0, tn 1. Above 0.4: tp 1, fp 0, fn 1, tn 2. Both MCC 0.577.
    scores, labels = [0.1, 0.2, 0.4, 0.9], [0, 1, 0, 1]
    _, values = mcc_curve(scores, labels)
    assert values[0] == pytest.approx(values[2])
    assert best_threshold(scores, labels) == pytest.approx((0.4 + 0.9) / 2)


def test_best_threshold_does_not_hang_on_one_clip() -> None:
    # The positive at 0.002 makes 0.0015 the very best, where a negative at 0.008 is a false alarm.
    negatives = [*np.linspace(0.0001, 0.001, 58), 0.001, 0.008]
    scores, labels = [*negatives, 0.002, *np.linspace(0.7, 1.0, 19)], [0] * 60 + [1] * 20
    thresholds, values = mcc_curve(scores, labels)
    assert thresholds[np.argmax(values)] < 0.002
    assert 0.2 < best_threshold(scores, labels) < 0.7


def test_best_threshold_separates_neighbouring_floats() -> None:
    for low in (0.5, np.nextafter(0.5, 1)):
        scores, labels = [low, np.nextafter(low, 1)], [0, 1]
        assert mcc(confusion(scores, labels, best_threshold(scores, labels))) == 1


def test_best_threshold_of_a_model_worse_than_chance_calls_nothing_positive() -> None:
    assert best_threshold([0.2, 0.8], [1, 0]) >= 0.8


def test_prior_correction_is_bayes_rule_keeps_order_and_undoes_itself() -> None:
    scores = np.array([0, 1e-300, 1e-9, 0.25, 0.75, 1 - 1e-12, 1])
    # Odds 1 at a prior of 1/4 (odds 1/3) is evidence of 3; times odds 1/99 that is 1/33.
    assert prior_correct([0.5], trained_at=0.25, world=0.01) == pytest.approx(1 / 34)
    moved = prior_correct(scores, trained_at=0.25, world=0.003)
    assert (moved[0], moved[-1]) == (0, 1)
    assert np.all(np.diff(moved) > 0)
    assert prior_correct(moved, trained_at=0.003, world=0.25) == pytest.approx(scores)


@pytest.mark.parametrize("rates", [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, np.nan)])
def test_prior_correction_refuses_impossible_rates(rates: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        prior_correct([0.5], *rates)


def test_calibration_error_by_hand() -> None:
    # Bins {0.1, 0.3} with 1 of 2 positive and {0.6, 0.8} with 2 of 2: (|0.2-0.5| + |0.7-1|) / 2.
    assert expected_calibration_error([0.8, 0.1, 0.6, 0.3], [1, 0, 1, 1], bins=2) == pytest.approx(
        0.3
    )


def test_bins_hold_equal_numbers_of_clips_and_ties_share_one() -> None:
    scores, labels = np.full(40, 0.3), np.arange(40) < 12
    assert reliability(scores, labels).clips.tolist() == [40]
    spread = np.random.default_rng(0).random(103)
    assert set(reliability(spread, spread > 0.5).clips.tolist()) == {10, 11}
    assert expected_calibration_error(scores, labels) == pytest.approx(0)
    assert expected_calibration_error(scores, labels[::-1]) == pytest.approx(0)


def test_bootstrap_is_seeded_and_centred_on_the_figures() -> None:
    scores, labels = drawn(1, clips=400)
    first = stratified_bootstrap(scores, labels, 0.5, seed=4)
    again = stratified_bootstrap(scores, labels, 0.5, seed=4)
    other = stratified_bootstrap(scores, labels, 0.5, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    auc = float(binary_auroc(torch.tensor(scores), torch.tensor(labels)))
    assert first[0].mean() == pytest.approx(mcc(confusion(scores, labels, 0.5)), abs=0.01)
    assert first[1].mean() == pytest.approx(auc, abs=0.005)


def test_bootstrap_spread_is_that_of_redrawing_clips() -> None:
    scores, labels = drawn(2)
    generator = np.random.default_rng(0)
    positives, negatives = np.flatnonzero(labels), np.flatnonzero(labels == 0)
    direct = []
    for _ in range(400):
        clips = np.concatenate(
            [generator.choice(group, len(group)) for group in (positives, negatives)]
        )
        direct.append(mcc(confusion(scores[clips], labels[clips], 0.5)))
    draws, _ = stratified_bootstrap(scores, labels, 0.5)
    assert draws.std() == pytest.approx(np.std(direct), rel=0.12)


def test_bootstrap_counts_ties_half_and_needs_both_classes() -> None:
    _, auc = stratified_bootstrap(np.full(9, 0.5), np.arange(9) < 4, 0.5, resamples=3)
    assert auc.tolist() == [0.5] * 3
    with pytest.raises(RunError, match="both classes"):
        stratified_bootstrap([0.1, 0.2], [0, 0], 0.5)
