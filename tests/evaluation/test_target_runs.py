"""A short run of each kind of target, predicted, evaluated, reported and exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from helpers import fails, said
from safetensors.torch import load_file
from targets import SETTINGS, target_config, target_store
from torch import nn

from dist_train.data.store.reader import Store
from dist_train.evaluation import target_evaluation
from dist_train.evaluation.exported import load_exported
from dist_train.evaluation.model_card import ModelCard
from dist_train.evaluation.onnx_model import onnx_bytes
from dist_train.evaluation.predict import find_snapshots
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.evaluation.target_evaluation import TargetEvaluation
from dist_train.evaluation.target_table import VALUE, scores_of, target_of_table
from dist_train.run.data import open_run_data
from dist_train.run.model import make_model, target_of
from dist_train.run.record import open_run
from dist_train.targets import Target
from dist_train.training.train import train

pytestmark = pytest.mark.slow
KINDS = [kind for kind in SETTINGS if kind != "npz"]


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained and predicted, with two snapshots; not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    store = target_store(folder / "store", request.param)
    train(target_config(store, folder / "run", request.param, "snapshots.at=[2, 3]"))
    said("predict", folder / "run")
    return folder / "run"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_evaluation, "RESAMPLES", 100)


def table_of(run: Path) -> pd.DataFrame:
    return read_predictions(run / "predictions.csv").set_index("key")


def raw_of(table: pd.DataFrame) -> np.ndarray:
    target = target_of_table(table)
    return scores_of(table, target, VALUE) if target.kind == "regression" else scores_of(
        table, target
    )  # fmt: skip


def test_scores_are_the_mean_over_snapshots_by_hand(run: Path) -> None:
    config = open_run(run)
    data, target, model = open_run_data(run, config), target_of(config.target), make_model(config)
    assert target == data.target
    model.eval()
    table, keys = table_of(run), data.store.table["key"]
    raw = pd.DataFrame(raw_of(table), table.index)
    clips = [*data.numbers("val"), *data.numbers("test")]
    assert len(table) == len(clips) == 24
    for clip in clips[::5]:
        volume = torch.from_numpy(data.store.read(clip)).float()[None, None] / 255
        each = []
        for snapshot in find_snapshots(run):
            model.load_state_dict(load_file(snapshot))
            with torch.no_grad():
                each.append(target.scores(model(volume, None).double().numpy())[0])
        np.testing.assert_allclose(raw.loc[keys[clip]], np.mean(each, axis=0), rtol=1e-4)
    assert not (run / "submission.csv").exists()
    assert (run / "calibration.json").exists() is (target.kind != "regression")


def test_the_page_has_the_figures_of_the_kind(run: Path) -> None:
    kind = open_run(run).target.kind
    assert "clips" in said("evaluate", run, "--by", "group")
    said("report", run)
    page = (run / "report.html").read_text()
    titles = {
        "multiclass": ["Confusion", "Called another class", "Balanced accuracy"],
        "ordinal": ["Confusion", "Quadratic kappa"],
        "multilabel": ["Precision and recall", "left: wrong"],
        "regression": ["speed: predicted against true", "b: residuals", "speed: farthest from"],
    }
    for title in [*titles[kind], "By group"]:
        assert title in page
    assert "MCC at 0.5" not in page


def some_clips(run: Path) -> Iterator[tuple[str, torch.Tensor, np.ndarray]]:
    """Keys, clips [1, 1, D, H, W], and what predictions.csv has for them."""
    store, table = Store(open_run(run).store), table_of(run)
    for key, expected in list(zip(table.index, raw_of(table), strict=True))[::4]:
        volumes = torch.from_numpy(store.read(store.clip_of(key)).copy())[None, None]
        yield key, volumes, expected


def by_onnx(graph: Path | bytes, target: Target, volumes: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    name = "value" if target.kind == "regression" else "probability"
    inputs = {"volumes": volumes.numpy(), "frames": np.full(len(volumes), volumes.shape[2])}
    (found,) = session.run([name], inputs)
    assert found.dtype == np.float32
    return found


def test_a_file_alone_gives_the_predictions(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    said("export", run, "--out", out)
    model, table = load_exported(out), table_of(run)
    assert model.target == target_of(open_run(run).target)
    for key, volumes, expected in some_clips(run):
        found = model.probability(volumes)
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)
        if model.target.kind != "regression":
            columns = [f"calibrated:{c}" for c in model.target.classes]
            np.testing.assert_allclose(
                model.calibrated(found)[0], table.loc[key, columns].astype(float), rtol=1e-3,
                atol=1e-6,
            )  # fmt: skip


@pytest.mark.parametrize(
    "run",
    [pytest.param(kind, marks=() if kind == "ordinal" else pytest.mark.soak) for kind in KINDS],
    indirect=True,
)
def test_an_onnx_file_alone_gives_the_predictions(run: Path, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    said("export", run, "--out", tmp_path / "model.safetensors", "--onnx", graph)
    for _, volumes, expected in some_clips(run):
        found = by_onnx(graph, target_of(open_run(run).target), volumes.float() / 255)
        np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-5)


class Brightness(nn.Module):
    """As small as a network can be."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, outputs)

    def forward(self, volumes: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        sums = volumes.mean(dim=(1, 3, 4)).sum(dim=1, keepdim=True)
        return self.head(10 * sums / frames[:, None])


def test_onnx_has_the_scores_of_each_kind(run: Path) -> None:
    target = target_of(open_run(run).target)
    models = [Brightness(target.outputs) for _ in range(2)]
    volumes = torch.rand(3, 1, 5, 4, 4)
    with torch.no_grad():
        logits = [model(volumes, torch.full((3,), 5)).double().numpy() for model in models]
    expected = np.mean([target.scores(each) for each in logits], axis=0)
    found = by_onnx(onnx_bytes(models, (1, 4, 4), {}, target), target, volumes)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_another_store_is_predicted_with_or_without_labels(run: Path, tmp_path: Path) -> None:
    kind = open_run(run).target.kind
    same, other = open_run(run).store, target_store(tmp_path / "s", "npz")
    for number, store in enumerate((same, other)):
        out = tmp_path / str(number)
        said("predict", run, "--store", store, "--out", out)
        table = pd.read_csv(out / "predictions.csv")
        labels = table[[c for c in table if c == "label" or c.startswith("label:")]]
        assert len(table) == 72
        assert labels.notna().all(axis=None) if store == same else labels.isna().all(axis=None)
    if kind in ("multiclass", "ordinal"):
        prior = "flowing=0.8,slowed=0.1,stalled=0.1"
        said("predict", run, "--store", same, "--out", tmp_path / "p", "--prior", prior)
        moved = pd.read_csv(tmp_path / "p" / "predictions.csv")
        assert moved["calibrated:flowing"].mean() > moved["probability:flowing"].mean()
    assert fails("predict", run, "--prior", "0.5").startswith("prior: ")
    if kind != "multilabel":
        assert fails("predict", run, "--threshold", "0.5").startswith("threshold: kind ")


def test_the_model_card_of_the_kind(run: Path, tmp_path: Path) -> None:
    """Its metrics are those of ``evaluation.json``."""
    said("evaluate", run)
    said("export", run, "--out", tmp_path / "model.safetensors")
    card = ModelCard.model_validate_json((tmp_path / "model.json").read_text())
    target = target_of(open_run(run).target)
    evaluation = TargetEvaluation.model_validate_json((run / "evaluation.json").read_text())
    assert (card.model.target, tuple(card.model.classes)) == (target.kind, target.classes)
    assert card.evaluation is not None
    for name, figure in evaluation.metrics.items():
        assert card.evaluation.metrics[name].value == figure.value
        assert card.evaluation.metrics[name].ci95 == figure.ci95
    assert sum(card.data.by_split["train"].values()) >= 48
    assert isinstance(card.decision.threshold, dict) is (target.kind == "multilabel")
    if target.kind == "regression":
        assert (card.decision.prior, card.decision.calibration) == (None, None)
        assert "model.calibrated" not in "".join(card.use)
    else:
        assert isinstance(card.decision.prior, dict)
        assert tuple(card.decision.prior) == target.classes
    text = (tmp_path / "model.md").read_text()
    assert all(name.replace("_", "\\_") in text for name in evaluation.metrics)
