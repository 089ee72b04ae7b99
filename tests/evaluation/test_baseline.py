"""Baselines of recorded columns: what sizes alone predict, by the splits and metrics of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import refused, said, tiny_config
from npy_store import npy_store
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from dist_train.errors import ConfigError
from dist_train.evaluation import target_evaluation
from dist_train.evaluation.baseline import baseline
from dist_train.evaluation.evaluate import Evaluation, evaluate_run
from dist_train.evaluation.target_evaluation import TargetEvaluation
from dist_train.metrics import best_threshold, confusion, mcc

SPLITS = {"train": 90, "val": 60, "test": 60}


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a third is positive: deeper by two frames in the mean, and of one of two
    microscopes more often."""
    random = np.random.RandomState(0)
    clips = []
    for split, number in SPLITS.items():
        for label in np.arange(number) % 3 == 0:
            depth = int(random.randint(3, 8)) + 2 * label
            scope = "a" if random.rand() < (0.9 if label else 0.2) else "b"
            pixels = np.zeros((depth, random.randint(8, 12), 8), np.uint8)
            pixels[0, 0, :2] = len(clips) // 256, len(clips) % 256
            clips.append((pixels, {"label": int(label), "split": split, "scope": scope}))
    return npy_store(tmp_path_factory.mktemp("sized"), clips)


def test_logistic_regression_is_scikit_learn_s_by_the_run_s_splits(
    sized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sizes"
    found = baseline(tiny_config(sized, out), columns=["depth", "height"])
    assert isinstance(found, Evaluation)
    table = pd.read_csv(out / "predictions.csv")
    assert table["split"].value_counts().to_dict() == {"val": 60, "test": 60}
    clips = pd.read_csv(sized.parent / "clips.csv").set_index("filename")
    shapes = [np.load(sized.parent / "raw" / name).shape[:2] for name in clips.index]
    train = (clips["split"] == "train").to_numpy()
    sizes = StandardScaler().fit(np.array(shapes)[train]).transform(np.array(shapes))
    oracle = LogisticRegression(class_weight="balanced").fit(sizes[train], clips["label"][train])
    probability = pd.Series(oracle.predict_proba(sizes)[:, 1], clips.index)
    np.testing.assert_allclose(table["probability"], probability[table["filename"]], rtol=1e-5)
    val, test = (table[table["split"] == split] for split in ("val", "test"))
    threshold = best_threshold(val["calibrated"], val["label"])
    expected = mcc(confusion(test["calibrated"], test["label"], threshold))
    assert found.mcc == pytest.approx(expected)
    assert 0.2 < found.mcc < 0.9
    assert found.mcc_ci95[0] < found.mcc < found.mcc_ci95[1]


@pytest.mark.parametrize("model", ["logistic", "boosting"])
def test_a_further_column_helps_and_the_command_line_tells(
    sized: Path, tmp_path: Path, model: str
) -> None:
    settings = [f"store={sized}", "seed=3", "--model", model]
    results = []
    for columns in ("depth,height,width", "depth, scope"):
        out = tmp_path / columns.partition(",")[2]
        told = said("baseline", *settings, f"out={out}", "--columns", columns)
        results.append(Evaluation.model_validate_json((out / "evaluation.json").read_text()))
        assert f"{results[-1].mcc:.3f}" in told
        # It is read as a run's folder, and may be written again.
        assert f"{results[-1].mcc:.3f}" in said("evaluate", out)
        assert said("baseline", *settings, f"out={out}", "--columns", columns) == told
    assert results[1].mcc > results[0].mcc + 0.1


def test_equal_sizes_predict_nothing(store: Path, tmp_path: Path) -> None:
    found = baseline(tiny_config(store, tmp_path / "out"), model="boosting")
    assert isinstance(found, Evaluation)
    assert found.mcc == 0.0


CLASSES = ["flowing", "slowed", "stalled"]
KINDS = {
    "multiclass": [],
    "ordinal": ["target.kind=ordinal", f"target.classes=[{', '.join(CLASSES)}]"],
    "multilabel": ["target.kind=multilabel", "target.columns=[deep, high, all]"],
    "regression": ["target.kind=regression", "target.columns=[speed, flow]"],
}


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose labels of all kinds depend on depth and height."""
    random = np.random.RandomState(0)
    clips = []
    for split, number in SPLITS.items():
        for _ in range(number):
            depth, height = random.randint(3, 12), random.randint(6, 12)
            pixels = np.zeros((depth, height, 8), np.uint8)
            pixels[0, 0, :2] = len(clips) // 256, len(clips) % 256
            place = np.clip((depth - 3 + random.randint(-1, 2)) // 3, 0, 2)
            columns = {
                "label": CLASSES[place], "deep": int(depth + random.randn() > 7),
                "high": int(height + random.randn() > 9), "all": 1, "speed": depth * 10.0,
                "flow": height + random.randn(), "split": split,
            }  # fmt: skip
            clips.append((pixels, columns))
    return npy_store(tmp_path_factory.mktemp("kinds"), clips)


@pytest.mark.parametrize("model", ["logistic", "boosting"])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_predict_each_kind_of_target(
    of_kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, model: str
) -> None:
    monkeypatch.setattr(target_evaluation, "RESAMPLES", 100)
    config = tiny_config(of_kinds, tmp_path / "out", *KINDS[kind])
    found = baseline(config, model=model)  # type: ignore[arg-type]
    assert isinstance(found, TargetEvaluation)
    assert (found.kind, found.clips) == (kind, SPLITS["test"])
    assert evaluate_run(config.out) == found
    assert (config.out / "calibration.json").exists() is (kind != "regression")
    name, least = {"regression": ("r2", 0.6), "multilabel": ("auc", 0.7)}.get(kind, ("mcc", 0.4))
    assert found.metrics[name].value > least
    table = pd.read_csv(config.out / "predictions.csv")
    clips = pd.read_csv(of_kinds.parent / "clips.csv").set_index("filename").loc[table["filename"]]
    if kind == "regression":
        np.testing.assert_allclose(table["label:flow"], clips["flow"], rtol=1e-5)
    elif kind == "multilabel":
        # What all training clips have is not told from the columns.
        assert set(table["probability:all"]) == {0.5}
        assert table["calibrated:all"].min() > 0.95
    else:
        assert (table["class"].to_numpy() == clips["label"]).all()


def test_scores_of_classes_and_values_are_scikit_learn_s(of_kinds: Path, tmp_path: Path) -> None:
    clips = pd.read_csv(of_kinds.parent / "clips.csv").set_index("filename")
    shapes = np.array([np.load(of_kinds.parent / "raw" / name).shape for name in clips.index])
    train = (clips["split"] == "train").to_numpy()
    sizes = StandardScaler().fit(shapes[train]).transform(shapes)
    classes = LogisticRegression(class_weight="balanced").fit(sizes[train], clips["label"][train])
    values = Ridge().fit(sizes[train], clips["flow"][train])
    for kind, column, expected in (
        ("multiclass", "probability:slowed", classes.predict_proba(sizes)[:, 1]),
        ("regression", "value:flow", values.predict(sizes)),
    ):
        out = tmp_path / kind
        baseline(tiny_config(of_kinds, out, *KINDS[kind]))
        table = pd.read_csv(out / "predictions.csv")
        own = pd.Series(expected, clips.index)[table["filename"]]
        np.testing.assert_allclose(table[column], own, rtol=1e-3)


def test_the_column_that_labels_come_from_is_no_column(of_kinds: Path, tmp_path: Path) -> None:
    config = tiny_config(of_kinds, tmp_path / "out", *KINDS["regression"])
    with pytest.raises(ConfigError, match="no column 'speed'"):
        baseline(config, columns=["depth", "speed"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--columns", "depth,deepness"], "no column 'deepness'. There are depth, height, width,"),
        (["--columns", ","], "columns: there are no columns"),
        (["split.train_on_all=true"], "split.train_on_all: no clips are held out"),
    ],
)
def test_what_cannot_be_is_refused(
    sized: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    assert message in refused("baseline", f"store={sized}", f"out={tmp_path / 'out'}", *more)
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_the_folder_of_a_run_is_left_alone(sized: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    message = refused("baseline", f"store={sized}", f"out={tmp_path}")
    assert "the folder is that of a run ('config.yaml' is in it)" in message


def test_without_scikit_learn_it_says_what_to_install(
    sized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.evaluation.baseline.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dist_train\[check\]'"):
        baseline(tiny_config(sized, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
