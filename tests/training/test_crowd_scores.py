"""Soft labels and weights from crowd scores, in a run and by themselves."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metrics_of, tiny_config
from npy_store import npy_store
from short_runs import train_until
from targets import target_config, target_store

from dist_train.config import Config
from dist_train.data.loading.collate import collate
from dist_train.data.loading.sampler import Slot
from dist_train.errors import ConfigError
from dist_train.run.data import open_data
from dist_train.run.model import as_input, make_model
from dist_train.run.record import read_record
from dist_train.targets import Target
from dist_train.training.class_rates import ClassRates, class_rates
from dist_train.training.crowd_scores import CrowdScores
from dist_train.training.implied_rate import implied_rate
from dist_train.training.inputs import MakeInputs

#: Crowd scores of the positives and of the negatives of the train split, in turn.
POSITIVE, NEGATIVE = (0.9, None, 0.7), (0.0, 0.2, None, 0.6)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose clips have the crowd scores above."""
    random = np.random.default_rng(0)
    clips = []
    for split, counts in {"train": (28, 12), "val": (6, 4), "test": (6, 4)}.items():
        for label, count in enumerate(counts):
            for number in range(count):
                pixels = random.integers(0, 120, (8, 16, 16), np.uint8)
                pixels[:, 5:11, 5:11] += 100 * label
                scores = POSITIVE if label else NEGATIVE
                score = scores[number % len(scores)]
                columns = {"label": label, "split": split, "crowd_score": score}
                clips.append((pixels, columns))
    return npy_store(tmp_path_factory.mktemp("scored"), clips)


def crowd_of(config: Config) -> tuple[CrowdScores, ClassRates]:
    data = open_data(config)
    rates = class_rates(data)
    return CrowdScores(data, rates), rates


SOFT = "loss.soft_labels=crowd_score"
SURE = "loss.sureness=margin"


def test_a_label_is_the_score_where_it_is_known(scored: Path, tmp_path: Path) -> None:
    config = tiny_config(scored, tmp_path, SOFT, SURE)
    crowd, _ = crowd_of(config)
    table = open_data(config).store.table
    clips = np.arange(len(table))
    score, label = table["crowd_score"], table["label"]
    expected = [y if np.isnan(s) else s for s, y in zip(score, label, strict=True)]
    np.testing.assert_allclose(crowd.labels(clips), np.array(expected, np.float32))
    margin = [1.0 if np.isnan(s) else abs(2 * s - 1) for s in score]
    weights = crowd.weights(clips)
    assert weights is not None
    np.testing.assert_allclose(weights / weights[0], margin / margin[0], rtol=1e-6)
    # At 1:3 the mean over a batch is 1.
    means = np.mean([0.8, 1, 0.4]), np.mean([1, 0.6, 1, 0.2])
    assert weights[0] / margin[0] == pytest.approx(1 / (0.25 * means[0] + 0.75 * means[1]))
    hard, _ = crowd_of(tiny_config(scored, tmp_path, SURE))
    np.testing.assert_array_equal(hard.labels(clips), label)


def test_the_share_of_positives_is_that_of_the_scores(scored: Path, tmp_path: Path) -> None:
    config = tiny_config(scored, tmp_path, SOFT)
    crowd, rates = crowd_of(config)
    positives, negatives = np.mean([0.9, 1, 0.7]), np.mean([0, 0.2, 0, 0.6])
    found = implied_rate(config.loss, Target("binary", ("no", "yes")), rates, crowd)
    assert found == pytest.approx(0.25 * positives + 0.75 * negatives, rel=1e-6)


def test_a_run_is_trained_on_scores_and_measured_by_classes(scored: Path, tmp_path: Path) -> None:
    config = tiny_config(scored, tmp_path / "run", SOFT, SURE, "loss.class_weights={positive: 2}")
    train_until(config, 6)
    lines = metrics_of(tmp_path / "run")
    data, plan = open_data(config), open_data(config).plan()
    clips = [int(clip) for clip in plan.global_batch(0)]
    batch = collate(data.dataset(training=True), [Slot(clip, 0) for clip in clips])
    crowd, rates = crowd_of(config)
    y = crowd.labels(np.array(clips))
    with torch.no_grad():
        z = make_model(config).train()(as_input(batch.volumes, config), batch.frames).numpy()
    bce = np.logaddexp(0, -z) * y + np.logaddexp(0, z) * (1 - y)
    weights = crowd.weights(np.array(clips)) * (1 + y) / (0.75 + 2 * 0.25)
    assert lines[0]["train/loss"] == pytest.approx((bce * weights).mean(), rel=1e-5)
    # Metrics of an epoch need classes.
    assert 0 <= lines[-1]["train/auc"] <= 1
    assert read_record(tmp_path / "run")["positive_rate"]["train_batches"] == pytest.approx(
        implied_rate(config.loss, data.target, rates, crowd)
    )
    made = MakeInputs(data, rates, group=4, teacher=None)(batch, config, 0)
    assert torch.equal(batch.labels, torch.tensor([1.0, 0, 0, 0] * 2))
    np.testing.assert_array_equal(made.labels, y)


def test_scores_against_the_class_are_warned_of(
    scored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        crowd_of(tiny_config(scored, tmp_path, SOFT))
    # Of 28 negatives each fourth has a score of 0.6; 8 of 12 and 21 of 28 have any.
    assert "7 of the 29 training clips with a crowd score" in caplog.text


def test_what_cannot_give_labels_is_refused(store: Path, scored: Path, tmp_path: Path) -> None:
    for setting, where in ((SOFT, "loss.soft_labels"), (SURE, "loss.sureness")):
        with pytest.raises(ConfigError, match=f"{where}: no clip of the train split has a crowd"):
            crowd_of(tiny_config(store, tmp_path, setting))
        config = target_config(
            target_store(tmp_path / where, "ordinal"), tmp_path, "ordinal", setting
        )
        with pytest.raises(ConfigError, match=f"{where}: a crowd score is of two classes"):
            crowd_of(config)
