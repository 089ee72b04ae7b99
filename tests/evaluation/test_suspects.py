"""Wrong labels are found: in drawn scores, and in clips whose labels were changed on purpose."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import fails, overrides, said
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from dist_train.config import load_config
from dist_train.data.store.build import prepare_arrays
from dist_train.data.table.manifest import read_manifest
from dist_train.evaluation.class_calibration import (
    ClassCalibration,
    LabelCalibration,
    fit_classes,
    fit_labels,
)
from dist_train.evaluation.predict import predict
from dist_train.evaluation.suspects import OUTLIER, find_suspects, judge_classes, judge_values
from dist_train.evaluation.target_table import columns_of
from dist_train.run.folder import SUSPECTS
from dist_train.targets import Kind, Target
from dist_train.training.train import train

NAMES = ("flowing", "slowed", "stalled")


def scores(
    *, classes: int, rarest: float, apart: float, sure: float, seed: int, clips: int = 1500
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [N, K] of a model that is trained on labels of which 5 % are flipped; the given
    labels; which are flipped.

    Features are normal around a point for each class; two points are ``apart``. The model knows the
    distributions, so that its probabilities are those of the given labels, but for a temperature of
    1 / ``sure``.
    """
    random = np.random.default_rng(seed)
    share = np.append(np.full(classes - 1, (1 - rarest) / (classes - 1)), rarest)
    truth = random.choice(classes, clips, p=share)
    x = random.normal(size=(clips, classes)) + apart / np.sqrt(2) * np.eye(classes)[truth]
    flipped = np.zeros(clips, bool)
    flipped[random.choice(clips, clips // 20, replace=False)] = True
    label = np.where(flipped, truth + random.integers(1, classes, clips), truth) % classes
    change = np.zeros((classes, classes))
    np.add.at(change, (truth, label), 1)
    change /= np.maximum(change.sum(axis=1, keepdims=True), 1)
    of_given = softmax(x * apart / np.sqrt(2) + np.log(share), axis=1) @ change
    return softmax(sure * np.log(of_given + 1e-300), axis=1), label, flipped


@given(
    classes=st.integers(2, 5),
    rarest=st.floats(0.01, 0.2),
    # An AUC of 0.988 and more of two classes.
    apart=st.floats(3.2, 5),
    sure=st.floats(0.6, 1.7),
    seed=st.integers(0, 2**31),
)
def test_the_flipped_labels_are_in_the_top_tenth(
    classes: int, rarest: float, apart: float, sure: float, seed: int
) -> None:
    p, label, flipped = scores(classes=classes, rarest=rarest, apart=apart, sure=sure, seed=seed)
    found = judge_classes(p, label)
    assert flipped[found.order[: len(label) // 10]].sum() >= 0.8 * flipped.sum()
    assert flipped[found.likely].mean() > 3 * flipped.mean()
    assert (found.suggested[found.likely] != label[found.likely]).all()
    assert (np.diff(found.quality[found.order]) >= 0).all()
    assert ((found.quality >= 0) & (found.quality <= 1)).all()
    # The names of the classes do not matter.
    turned = judge_classes(p[:, ::-1], classes - 1 - label)
    np.testing.assert_allclose(turned.quality, found.quality, rtol=1e-9)
    assert (turned.likely == found.likely).mean() > 0.999


@given(
    st.integers(2, 4).flatmap(
        lambda k: st.lists(
            st.tuples(st.integers(0, k - 1), st.lists(st.floats(0.01, 1), min_size=k, max_size=k)),
            min_size=k,
            max_size=40,
        )
    )
)
def test_it_is_confident_learning_by_the_paper(clips: list[tuple[int, list[float]]]) -> None:
    """Thresholds, confident joint and pruning, step by step."""
    label = np.array([given for given, _ in clips])
    p = np.array([scores for _, scores in clips])
    p /= p.sum(axis=1, keepdims=True)
    classes = p.shape[1]
    threshold = [
        np.mean([row[k] for row, given in zip(p, label, strict=True) if given == k])
        if k in label
        else 2.0
        for k in range(classes)
    ]
    joint = np.zeros((classes, classes))
    for row, given_label in zip(p, label, strict=True):
        above = [k for k in range(classes) if row[k] >= threshold[k]]
        if above:
            joint[given_label, max(above, key=lambda k: row[k])] += 1
    pruned = set[int]()
    for i in range(classes):
        for j in range(classes):
            if i != j and joint[i].sum():
                own = [n for n in range(len(p)) if label[n] == i]
                count = round(joint[i, j] / joint[i].sum() * len(own))
                pruned |= set(sorted(own, key=lambda n: p[n, i] - p[n, j])[:count])
    best = [max(range(classes), key=lambda k: row[k] / threshold[k] * (k in label)) for row in p]
    expected = {n for n in pruned if best[n] != label[n]}
    found = judge_classes(p, label)
    assert set(np.flatnonzero(found.likely).tolist()) == expected
    assert found.suggested.tolist() == best


def test_rare_positives_are_not_suspects_because_they_are_rare() -> None:
    """A weak model of one positive in a hundred, whose labels are all right."""
    random = np.random.default_rng(0)
    label = (random.random(20000) < 0.01).astype(np.int64)
    positive = label == 1
    odds = np.exp(2.5 * (random.normal(size=20000) + 2.5 * label) - 2.5**2 / 2) * 0.01 / 0.99
    p = np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)
    found = judge_classes(p, label)
    assert (p[positive, 1] < 0.5).mean() > 0.6
    assert found.likely[positive].mean() < 0.5
    assert (found.quality[positive] > 0.5).mean() > 0.4
    # As many as there are positives: most would be positives by the plain probability.
    first = np.argsort(p[np.arange(20000), label])[: positive.sum()]
    assert positive[first].mean() > 1.3 * positive[found.order[: positive.sum()]].mean()


def test_residuals_are_measured_by_those_that_are_right() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=400) * 5
    value = truth + random.normal(size=400) + 3
    truth[:20] += 8
    found = judge_values(value, truth)
    assert set(found.order[:20].tolist()) == set(range(20))
    assert found.likely[:20].all()
    assert found.likely[20:].mean() < 0.01
    residual = truth - value
    spread = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    z = np.abs(residual - np.median(residual)) / spread
    assert (found.likely == (z > OUTLIER)).all()
    # Of a model without error for most clips, and for all.
    assert judge_values(truth, np.where(np.arange(400) < 3, truth + 1, truth)).likely.sum() == 3
    assert not judge_values(truth, truth).likely.any()


def write(
    folder: Path,
    target: Target,
    labels: np.ndarray,
    scores: np.ndarray,
    calibration: ClassCalibration | LabelCalibration | None = None,
) -> Path:
    """A folder with predictions of val and test clips."""
    thresholds = dict.fromkeys(target.classes, 0.5)
    calibrated = scores if calibration is None else calibration.apply(scores)
    columns = columns_of(target, labels, scores, calibrated, thresholds)
    keys = [f"clip{n:03d}" for n in range(len(labels))]
    splits = np.resize(["val", "test"], len(labels))
    table = {"key": keys, "filename": keys, "group": "g", "split": splits} | columns
    folder.mkdir()
    pd.DataFrame(table | {"frames": 8}).to_csv(folder / "predictions.csv", index=False)
    if calibration is not None:
        (folder / "calibration.json").write_text(calibration.model_dump_json())
    return folder


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
def test_a_table_of_classes(tmp_path: Path, kind: Kind) -> None:
    p, label, flipped = scores(classes=3, rarest=0.2, apart=4, sure=1, seed=2, clips=300)
    label[0] = -1
    run = write(tmp_path / "run", Target(kind, NAMES), label, p)
    told = said("suspects", run)
    assert told.startswith("only the 299 clips of val and test were judged")
    table = pd.read_csv(run / SUSPECTS)
    assert list(table) == [
        "key", "filename", "group", "label", "class", "suggested", "quality", "rank", "likely",
    ]  # fmt: skip
    assert table["rank"].tolist() == list(range(1, 300))
    assert table["quality"].is_monotonic_increasing
    assert f"{table['likely'].sum()} of 299 labels are likely wrong" in told
    number = table["key"].str.removeprefix("clip").astype(int).to_numpy()
    assert (table["label"] == label[number]).all()
    assert (table["class"] == np.array(NAMES)[table["label"]]).all()
    assert flipped[number[:30]].sum() >= 0.8 * flipped[1:].sum()
    judged = judge_classes(p[1:], label[1:])
    assert (table["suggested"] == np.array(NAMES)[judged.suggested[number - 1]]).all()
    assert (table["likely"] == judged.likely[number - 1]).all()


def test_a_table_of_labels_judges_each_by_itself(tmp_path: Path) -> None:
    each = [scores(classes=2, rarest=0.3, apart=4, sure=1, seed=n, clips=300) for n in range(2)]
    p = np.stack([p[:, 1] for p, _, _ in each] + [np.full(300, 0.1)], axis=1)
    label = np.stack([label for _, label, _ in each] + [np.zeros(300, int)], axis=1)
    run = write(tmp_path / "run", Target("multilabel", NAMES), label.astype(float), p)
    assert "'stalled' is not judged: all clips have the same label" in said("suspects", run)
    table = pd.read_csv(run / SUSPECTS)
    assert table["rank"].tolist() == list(range(1, 601))
    for k, (p, given_labels, flipped) in enumerate(each):
        own = table[table["class"] == NAMES[k]]
        number = own["key"].str.removeprefix("clip").astype(int).to_numpy()
        assert flipped[number[:30]].sum() >= 0.8 * flipped.sum()
        assert (own["label"] == given_labels[number]).all()
        found = judge_classes(p, given_labels)
        np.testing.assert_allclose(own["quality"], found.quality[number], atol=1e-9)
        assert (own["suggested"] == found.suggested[number]).all()


def test_a_table_of_values(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(60, 2)) * [10, 0.1]
    value = truth + random.normal(size=(60, 2)) * [1, 0.01]
    truth[7, 0] += 40
    truth[9, 1] -= 1
    run = write(tmp_path / "run", Target("regression", ("speed", "b")), truth, value)
    said("suspects", run)
    table = pd.read_csv(run / SUSPECTS)
    first = table.head(2).set_index("class")
    assert first["key"].to_dict() == {"speed": "clip007", "b": "clip009"}
    assert first["suggested"]["speed"] == pytest.approx(value[7, 0])
    assert first["label"]["speed"] == pytest.approx(truth[7, 0])
    assert first["likely"].all()


def test_what_cannot_be_judged_is_refused(tmp_path: Path, trained: Path) -> None:
    assert "there are no predictions" in fails("suspects", trained)
    p, label, _ = scores(classes=3, rarest=0.2, apart=4, sure=1, seed=2, clips=30)
    same = write(tmp_path / "same", Target("multiclass", NAMES), np.zeros(30, int), p)
    assert "the 30 labelled clips all have the same label" in fails("suspects", same)
    none = write(tmp_path / "none", Target("multiclass", NAMES), np.full(30, -1), p)
    assert "no clip has a label" in fails("suspects", none)
    few = write(tmp_path / "few", Target("multiclass", NAMES), label % 3, p)
    assert "fewer than 10 judged clips: stalled (" in said("suspects", few)
    (few / SUSPECTS).unlink()
    (few / SUSPECTS).symlink_to("/dev/null")
    assert "suspects.csv: is a device" in fails("suspects", few)


def test_the_prior_of_the_predictions_does_not_matter(trained: Path, tmp_path: Path) -> None:
    """Labels are judged at the share that the judged clips have."""
    run, found = Path(shutil.copytree(trained, tmp_path / "run")), []
    for prior in (0.02, 0.6):
        predict(run, prior=prior)
        assert find_suspects(run).labels == 20
        found.append(pd.read_csv(run / SUSPECTS))
    np.testing.assert_allclose(found[0]["quality"], found[1]["quality"], rtol=1e-6)
    assert (found[0]["key"] == found[1]["key"]).all()
    assert set(found[0]["class"]) == {"negative", "positive"}
    with (run / "predictions.csv").open("a") as file:
        file.write("\n")
    assert "not as it was predicted" in fails("suspects", run)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_nor_does_that_of_several_classes(tmp_path: Path, kind: Kind) -> None:
    found = []
    p, label, _ = scores(classes=3, rarest=0.2, apart=4, sure=1, seed=2, clips=300)
    truth = np.eye(3, dtype=np.int64)[label] if kind == "multilabel" else label
    val = np.arange(300) % 2 == 0
    for number, prior in enumerate([(0.1, 0.3, 0.6), (0.8, 0.1, 0.1)]):
        shares = dict(zip(NAMES, prior, strict=True)), dict.fromkeys(NAMES, 1 / 3)
        calibration: ClassCalibration | LabelCalibration = (
            fit_labels(p[val], truth[val], NAMES, batches_share=shares[1], prior=shares[0])
            if kind == "multilabel"
            else fit_classes(p[val], truth[val], batches_share=(1 / 3,) * 3, prior=prior)
        )
        run = write(tmp_path / str(number), Target(kind, NAMES), truth, p, calibration)
        find_suspects(run)
        found.append(pd.read_csv(run / SUSPECTS).sort_values(["key", "class"]))
    np.testing.assert_allclose(found[0]["quality"], found[1]["quality"], rtol=1e-4, atol=1e-9)
    assert (found[0]["likely"] == found[1]["likely"]).all()


def mislabelled_store(folder: Path) -> tuple[Path, set[str]]:
    """A store of 240 clips, a quarter of them with a bright square, of which 12 have the other
    label in the table of clips; and the names of these."""
    random, arrays, rows = np.random.default_rng(5), [], []
    flipped = set(random.choice(240, 12, replace=False).tolist())
    for number in range(240):
        positive = number % 4 == 0
        clip = random.integers(0, 120, (6, 16, 16), dtype=np.uint8)
        if positive:
            y, x = random.integers(2, 8, 2)
            clip[:, y : y + 6, x : x + 6] += 50
        arrays.append((clip, {}))
        label = int(positive != (number in flipped))
        rows.append({"filename": f"{number:03d}.npy", "label": label})
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    manifest = read_manifest(folder / "clips.csv")
    prepare_arrays(manifest, arrays, folder / "store", shard_clips=16)
    return folder / "store", {f"{number:03d}.npy" for number in flipped}


@pytest.mark.slow
def test_labels_changed_in_the_table_of_clips_are_found(tmp_path: Path) -> None:
    """By four trainings, each of which holds another fold out."""
    store, flipped = mislabelled_store(tmp_path)
    parts = []
    for fold in range(4):
        run = tmp_path / f"fold-{fold}"
        more = ("split.folds=4", f"split.fold={fold}", "snapshots.at=[6]", "train.epochs=6")
        train(load_config(None, overrides(store, run, *more)))
        predict(run)
        table = pd.read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
        parts.append(table[table["split"] == "test"].assign(fold=fold))
        # One fold alone has the labels of its own clips only.
        assert find_suspects(run).labels == len(table)
    whole = tmp_path / "whole"
    whole.mkdir()
    pd.concat(parts).to_csv(whole / "predictions.csv", index=False)
    told = said("suspects", whole)
    assert "only the" not in told
    found = pd.read_csv(whole / SUSPECTS)
    assert len(found) == 240
    top = set(found["filename"].head(24))
    assert len(top & flipped) >= 0.8 * len(flipped)
    likely = found[found["likely"]]
    assert likely["filename"].isin(flipped).mean() > 0.5
    assert (likely["suggested"] != likely["class"]).all()
