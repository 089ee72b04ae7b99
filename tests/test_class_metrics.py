"""Metrics by kind of target against scikit-learn, and by hand where that differs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn import metrics as oracle

from dist_train.class_metrics import (
    METRICS_OF,
    higher_is_better,
    main_metric,
    metrics_of,
    multiclass_mcc,
)
from dist_train.errors import ConfigError, RunError
from dist_train.metrics import METRICS, confusion, mcc
from dist_train.targets import Target


def target_of(kind: str, classes: int) -> Target:
    return Target(kind, tuple(f"c{k}" for k in range(classes)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0])
def test_classes(kind: str, classes: int, sharpness: float) -> None:
    random = np.random.default_rng(classes)
    truth = random.permutation(np.arange(200) % classes)
    logits = random.normal(size=(200, classes)) + sharpness * np.eye(classes)[truth] / 5
    scores = softmax(logits, axis=1)
    called = scores.argmax(axis=1)
    found = metrics_of(target_of(kind, classes), scores, truth)
    one_hot = np.eye(classes)[truth]
    expected = {
        "accuracy": oracle.accuracy_score(truth, called),
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, called),
        "kappa": oracle.cohen_kappa_score(truth, called),
        "mcc": oracle.matthews_corrcoef(truth, called),
        "auc": oracle.roc_auc_score(one_hot, scores, average="macro"),
        "ap": oracle.average_precision_score(one_hot, scores, average="macro"),
    }
    if kind == "ordinal":
        expected["qwk"] = oracle.cohen_kappa_score(truth, called, weights="quadratic")
        expected["mae"] = oracle.mean_absolute_error(truth, called)
    assert found == pytest.approx(expected)


def test_several_labels() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (150, 4))
    scores = expit(random.normal(size=truth.shape) + truth)
    found = metrics_of(target_of("multilabel", 4), scores, truth)
    assert found == pytest.approx(
        {
            "ap": oracle.average_precision_score(truth, scores, average="macro"),
            "auc": oracle.roc_auc_score(truth, scores, average="macro"),
            "accuracy": oracle.accuracy_score(truth.ravel(), scores.ravel() > 0.5),
        }
    )


def test_values() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(80, 3)) * [1, 10, 100]
    scores = truth + random.normal(size=truth.shape) * [0.5, 5, 200]
    found = metrics_of(target_of("regression", 3), scores, truth)
    assert found == pytest.approx(
        {
            "mae": oracle.mean_absolute_error(truth, scores),
            "rmse": oracle.root_mean_squared_error(truth, scores),
            "r2": oracle.r2_score(truth, scores),
        }
    )


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_two_classes_have_the_binary_coefficient(clips: list[tuple[int, float]]) -> None:
    label, score = (np.array(column) for column in zip(*clips, strict=True))
    counts = confusion(score, label, 0.5)
    assert multiclass_mcc(np.array([counts[:2], counts[2:]])) == pytest.approx(mcc(counts))


def test_a_class_without_clips_is_left_out_of_the_mean() -> None:
    scores = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    found = metrics_of(target_of("multiclass", 3), scores, np.array([0, 1, 1]))
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["auc"] == pytest.approx(1.0)


def test_what_cannot_be_computed_is_none() -> None:
    scores = np.full((4, 3), 1 / 3)
    found = metrics_of(target_of("multiclass", 3), scores, np.zeros(4, np.int64))
    assert found["auc"] is found["ap"] is found["kappa"] is None
    assert found["mcc"] == 0.0
    assert metrics_of(target_of("regression", 1), np.ones((3, 1)), np.ones((3, 1)))["r2"] is None
    nothing = metrics_of(target_of("ordinal", 3), np.empty((0, 3)), np.empty(0, np.int64))
    assert set(nothing.values()) == {None}


def test_a_score_that_is_no_number_is_refused() -> None:
    scores = np.array([[0.5, 0.5, 0.0], [np.nan, 0.5, 0.5]])
    with pytest.raises(RunError, match="of 1 of 2 clips the scores are not finite"):
        metrics_of(target_of("multiclass", 3), scores, np.array([0, 1]))


@pytest.mark.parametrize("kind", [*METRICS_OF, "binary"])
def test_every_metric_has_a_direction(kind: str) -> None:
    names = METRICS if kind == "binary" else METRICS_OF[kind]  # type: ignore[index]
    downwards = {n for n in names if not higher_is_better(f"val/{n}", kind)}  # type: ignore[arg-type]
    assert downwards == {"mae", "rmse"} & names.keys()
    assert not higher_is_better("val/loss", kind)  # type: ignore[arg-type]
    assert main_metric(kind)[0] in names  # type: ignore[arg-type]


def test_a_metric_of_another_kind_is_refused() -> None:
    assert higher_is_better("val/qwk")
    with pytest.raises(ConfigError, match=r"no metric 'val/qwk' for kind binary; there are val/"):
        higher_is_better("val/qwk", "binary")
