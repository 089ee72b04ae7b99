"""Calibration and metrics of several classes, labels and values, against other computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn import metrics as oracle

from dist_train.class_metrics import prior_correct_classes
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation import target_evaluation
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.class_calibration import fit_classes, fit_labels
from dist_train.evaluation.evaluate import evaluate, evaluate_any
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.evaluation.target_evaluation import TargetEvaluation, evaluate_target
from dist_train.evaluation.target_predict import check_prior
from dist_train.evaluation.target_table import Scored, columns_of, scored, target_of_table
from dist_train.evaluation.target_text import tables
from dist_train.metrics import prior_correct
from dist_train.targets import Kind, Target

NAMES = ("flowing", "slow, or so", "stalled")
THIRDS = (1 / 3,) * 3


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_evaluation, "RESAMPLES", 120)


def drawn(kind: Kind, clips: int = 90, seed: int = 0) -> Scored:
    """Scores that are right more often than not, and what is calibrated of them."""
    random, target = np.random.default_rng(seed), Target(kind, NAMES)
    if kind == "regression":
        truth = random.normal(size=(clips, 3)) * [1, 10, 100]
        values = truth + random.normal(size=(clips, 3)) * [1, 5, 20]
        return Scored(target, values, values, truth)
    if kind == "multilabel":
        truth = random.integers(0, 2, (clips, 3))
        probability = 1 / (1 + np.exp(-random.normal(2.0 * truth - 1)))
        return Scored(target, probability, probability**2, truth)
    truth = random.choice(3, clips, p=[0.6, 0.3, 0.1])
    probability = softmax(random.normal(size=(clips, 3)) + 1.5 * np.eye(3)[truth], axis=1)
    calibrated = prior_correct_classes(probability, THIRDS, (0.6, 0.3, 0.1))
    return Scored(target, probability, calibrated, truth)


def write(path: Path, clips: Scored, thresholds: dict[str, float], splits: object) -> Path:
    columns = columns_of(clips.target, clips.truth, clips.probability, clips.calibrated, thresholds)
    keys = [f"clip{n}" for n in range(len(clips))]
    pd.DataFrame(
        {"key": keys, "filename": keys, "group": "g", "split": splits, **columns, "frames": 8}
    ).assign(**{"meta:site": ["a", "b", ""] * (len(clips) // 3)}).to_csv(path, index=False)
    return path


def test_bayes_rule_of_two_classes_is_that_of_prior_correct() -> None:
    p = np.random.default_rng(0).random(50)
    both = prior_correct_classes(np.stack([1 - p, p], axis=1), (0.75, 0.25), (0.98, 0.02))
    np.testing.assert_allclose(both[:, 1], prior_correct(p, 0.25, 0.02), rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_classes_are_calibrated_as_binary(seed: int) -> None:
    """Too sure by a temperature of 3, without isotonic regression being the better one."""
    random = np.random.default_rng(seed)
    z = random.normal(size=600)
    y = (random.random(600) < 1 / (1 + np.exp(-z))).astype(int)
    p = 1 / (1 + np.exp(-3 * z))
    binary = fit(p, y, batches_share=0.5, prior=0.1)
    both = fit_classes(np.stack([1 - p, p], axis=1), y, batches_share=(0.5, 0.5), prior=(0.9, 0.1))
    assert both.method == binary.method == "temperature"
    assert both.slope == pytest.approx(binary.slope, rel=1e-4)
    np.testing.assert_allclose(
        both.apply(np.stack([1 - p, p], axis=1))[:, 1], binary.apply(p), rtol=1e-3
    )


def test_biases_of_classes_are_found() -> None:
    random = np.random.default_rng(0)
    z = 2 * random.normal(size=(6000, 3))
    y = (random.random(6000)[:, None] > softmax(z, axis=1).cumsum(axis=1)).sum(axis=1)
    wrong = softmax(2 * z + [1.0, 0.0, -1.0], axis=1)
    found = fit_classes(wrong, y, batches_share=THIRDS, prior=THIRDS)
    assert found.method == "temperature and bias"
    assert found.slope == pytest.approx(0.5, rel=0.1)
    mapped = found.apply(wrong)
    loss = {name: r.log_loss for name, r in found.cross_validated.items()}
    assert loss["temperature and bias"] < loss["temperature"] < loss["none"]
    assert oracle.log_loss(y, mapped) < oracle.log_loss(y, softmax(z, axis=1)) + 0.01
    np.testing.assert_allclose(mapped.sum(axis=1), 1)


def test_few_clips_fit_nothing() -> None:
    p = softmax(np.random.default_rng(0).normal(size=(12, 3)), axis=1)
    for y in (np.zeros(12, int), np.array([1] * 4 + [0] * 8)):
        found = fit_classes(p, y, batches_share=THIRDS, prior=(0.5, 0.3, 0.2))
        assert (found.method, found.cross_validated) == ("none", {})
        assert found.val_share == found.prior
    none = fit_classes(p[:0], y[:0], batches_share=THIRDS, prior=(0.5, 0.3, 0.2))
    by_bayes = prior_correct_classes(p, THIRDS, (0.5, 0.3, 0.2))
    np.testing.assert_allclose(none.apply(p), by_bayes, rtol=1e-12)


def test_labels_are_calibrated_each_by_itself() -> None:
    clips = drawn("multilabel", 200)
    shares = dict(zip(NAMES, (0.5, 0.4, 0.3), strict=True))
    found = fit_labels(clips.probability, clips.truth, NAMES, batches_share=shares, prior=shares)
    for k, name in enumerate(NAMES):
        own = fit(
            clips.probability[:, k], clips.truth[:, k], batches_share=shares[name],
            prior=shares[name],
        )  # fmt: skip
        assert found.labels[name] == own
        by_all = found.apply(clips.probability)[:, k]
        np.testing.assert_array_equal(by_all, own.apply(clips.probability[:, k]))


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
def test_metrics_of_classes_are_those_of_scikit_learn(kind: Kind) -> None:
    clips = drawn(kind)
    e = evaluate_target(clips, "test", {})
    y, called = clips.truth, clips.calibrated.argmax(axis=1)
    expected = {
        "mcc": oracle.matthews_corrcoef(y, called),
        "accuracy": oracle.accuracy_score(y, called),
        "balanced_accuracy": oracle.balanced_accuracy_score(y, called),
        "kappa": oracle.cohen_kappa_score(y, called),
        "auc": oracle.roc_auc_score(y, clips.probability, multi_class="ovr"),
    }
    if kind == "ordinal":
        expected["qwk"] = oracle.cohen_kappa_score(y, called, weights="quadratic")
        expected["mae"] = np.abs(y - called).mean()
    for name, value in expected.items():
        figure = e.metrics[name]
        assert figure.value == pytest.approx(value), name
        assert figure.ci95 is not None
        assert figure.ci95[0] < value < figure.ci95[1], name
    assert np.array_equal(e.confusion, oracle.confusion_matrix(y, called))
    precision, recall, _, clips_of = oracle.precision_recall_fscore_support(y, called)
    assert [c.clips for c in e.per_class] == clips_of.tolist()
    np.testing.assert_allclose([c.sensitivity for c in e.per_class], recall)
    np.testing.assert_allclose([c.precision for c in e.per_class], precision)
    assert e.raw is not None
    assert e.raw.log_loss == pytest.approx(oracle.log_loss(y, clips.probability))


def test_metrics_of_labels_are_those_of_scikit_learn() -> None:
    clips = drawn("multilabel")
    thresholds = dict(zip(NAMES, (0.2, 0.3, 0.4), strict=True))
    e = evaluate_target(clips, "test", thresholds)
    called = clips.calibrated > [0.2, 0.3, 0.4]
    y = clips.truth
    each = [oracle.matthews_corrcoef(y[:, k], called[:, k]) for k in range(3)]
    assert e.metrics["mcc"].value == pytest.approx(np.mean(each))
    assert e.metrics["auc"].value == pytest.approx(oracle.roc_auc_score(y, clips.probability))
    assert e.metrics["accuracy"].value == pytest.approx((called == y).mean())
    np.testing.assert_allclose(
        [c.precision for c in e.per_class], oracle.precision_score(y, called, average=None)
    )
    assert next(iter(e.metrics)) == "ap"


def test_metrics_of_values_are_those_of_scikit_learn() -> None:
    clips = drawn("regression")
    e = evaluate_target(clips, "test", {})
    y, p = clips.truth, clips.probability
    assert e.metrics["r2"].value == pytest.approx(oracle.r2_score(y, p))
    for v, value in enumerate(e.per_value):
        rmse = oracle.root_mean_squared_error(y[:, v], p[:, v])
        assert value.metrics["rmse"].value == pytest.approx(rmse)
        assert value.metrics["mae"].value == pytest.approx(np.abs(y - p)[:, v].mean())
        assert value.bias == pytest.approx((p - y)[:, v].mean())


@pytest.mark.parametrize("kind", ["multiclass", "ordinal", "multilabel", "regression"])
def test_a_table_is_read_back_and_evaluated_by_slices(kind: Kind, tmp_path: Path) -> None:
    clips = drawn(kind)
    thresholds = dict.fromkeys(NAMES, 0.5) if kind == "multilabel" else {}
    splits = ["val"] * 45 + ["test"] * 45
    path = write(tmp_path / "predictions.csv", clips, thresholds, splits)
    frame = read_predictions(path)
    assert target_of_table(frame) == clips.target
    read = scored(frame, clips.target)
    for name in ("probability", "calibrated", "truth"):
        assert np.array_equal(getattr(read, name), getattr(clips, name)), name
    out = tmp_path / "evaluation.json"
    e = evaluate_any(path, by="site", out=out)
    assert isinstance(e, TargetEvaluation)
    assert TargetEvaluation.model_validate_json(out.read_text()) == e
    assert (e.split, e.clips, e.kind) == ("test", 45, kind)
    assert [(s.value, s.clips) for s in e.slices] == [("a", 15), ("b", 15), ("", 15)]
    assert (e.threshold_fitted_on == "val") is (kind == "multilabel")
    assert all(view.row_count for view in tables(e))
    with pytest.raises(RunError, match=f"of kind {kind}, not of two classes"):
        evaluate(path)
    if kind != "multilabel":
        with pytest.raises(ConfigError, match=f"threshold: kind {kind} has none"):
            evaluate_any(path, threshold=0.5)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", "3", "label is '3', not the code of a class, or empty"),
        ("probability:stalled", "0.9999", "that makes a sum of 1 over the classes"),
        ("calibrated:stalled", "nan", "is 'nan', not a number between 0 and 1"),
        ("calibrated:stalled", None, "has not each column of each class"),
    ],
)
def test_a_wrong_value_is_named(
    column: str, value: str | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "predictions.csv", drawn("multiclass"), {}, "test")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if value is None:
        table = table.drop(columns=column)
    else:
        table.loc[7, column] = value
    table.to_csv(path, index=False)
    with pytest.raises(RunError, match=message):
        read_predictions(path)


@pytest.mark.parametrize(
    ("kind", "prior", "message"),
    [
        ("binary", {"positive": 0.1}, "two classes have one share"),
        ("regression", 0.1, "values of regression have no prior"),
        ("multiclass", 0.1, "0.1 does not say whose share it is"),
        ("multiclass", {"flowing": 0.1}, "it lacks 'slow, or so'"),
        ("multiclass", {"flown": 0.1}, "there is no class 'flown'"),
        ("multiclass", dict.fromkeys(NAMES, 0.3), "make 0.9, not 1"),
        ("multilabel", {"flowing": 1.0}, "1 is no share of 'flowing'"),
    ],
)
def test_a_prior_that_does_not_fit_the_kind_is_refused(
    kind: Kind, prior: float | dict[str, float], message: str
) -> None:
    target = Target() if kind == "binary" else Target(kind, NAMES)
    with pytest.raises(ConfigError, match=f"^prior: .*{message}"):
        check_prior(target, prior)
