"""Training on each kind of target, from the table of clips to the metrics of held-out clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare_losses import compare
from helpers import SUPPORT, board_of, metrics_of
from launcher import Launcher
from short_runs import assert_same_run, train_until
from targets import SETTINGS, table_store, target_config, target_overrides, target_store

from dist_train.class_metrics import METRICS_OF
from dist_train.config import Config, last_of_each, load_config
from dist_train.data.store.reader import Store
from dist_train.errors import CheckpointError, ConfigError, ModelError, PlanError
from dist_train.run.data import open_data
from dist_train.run.record import read_record
from dist_train.training.train import train

TRAINED = str(SUPPORT / "trained.py")
#: A metric of each kind, and what a short run must reach of it: chance is 1/3, 0, 1/2 and 0.
LEAST = {
    "npz": ("accuracy", 0.8),
    "multiclass": ("accuracy", 0.8),
    "ordinal": ("qwk", 0.7),
    "multilabel": ("auc", 0.9),
    "regression": ("r2", 0.5),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {kind: target_store(folder / kind, kind) for kind in SETTINGS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_short_run_learns(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    run, told = tmp_path / "run", []
    config = target_config(stores[kind], run, kind, "train.epochs=8", "snapshots.at=[8]")
    shown: list[str] = []
    train(config, say=told.append, progress=lambda done, steps, line="", /: shown.append(line))
    lines, name = metrics_of(run), "multiclass" if kind == "npz" else kind
    assert {f"val/{metric}" for metric in METRICS_OF[name]} <= lines[-1].keys()
    assert {f"train/{metric}" for metric in METRICS_OF[name]} <= lines[-1].keys()
    metric, least = LEAST[kind]
    assert max(line.get(f"val/{metric}", -9.0) for line in lines) > least
    assert board_of(run, f"val/{metric}")
    assert read_record(run)["target"]["kind"] == name
    assert "  val " in shown[-1]
    if kind in ("multiclass", "ordinal"):
        assert "train 16 flowing, 16 slowed, 16 stalled" in "\n".join(told)


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_a_killed_run_is_the_same_to_the_bit(
    kind: str, stores: dict[str, Path], tmp_path: Path
) -> None:
    straight, cut = (
        target_config(stores[kind], tmp_path / name, kind, "train.epochs=2", "snapshots.at=[2]")
        for name in ("straight", "cut")
    )
    train(straight)
    # Inside an epoch, whose predictions the checkpoint keeps.
    train_until(cut, 5)
    train(cut, resume="auto")
    assert read_record(cut.out)["sessions"][-1]["resumed_from_step"] == 4
    assert_same_run(straight.out, cut.out)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batch"), [("multiclass", 12), ("multilabel", 8)])
def test_two_processes_have_the_losses_of_one(
    kind: str, batch: int, stores: dict[str, Path], launcher: Launcher, tmp_path: Path
) -> None:
    more = f"plan.batch={batch}", "optim.lr=0.001", "train.epochs=2", "snapshots.at=[2]"
    train(target_config(stores[kind], tmp_path / "one", kind, *more))
    settings = target_overrides(stores[kind], tmp_path / "two", kind, *more)
    launcher.program(2, [TRAINED, *settings]).well()
    for figure in ("train/loss", "val/loss", "val/auc", "train/ap"):
        found = compare(tmp_path / "two", tmp_path / "one", 1e-4, figure=figure)
        assert found.rows
        assert found.first is None, f"{figure}: {found.rows}"


def test_classes_keep_their_codes_and_names_from_the_table_to_the_batch(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    store = Store(stores["multiclass"])
    assert store.info["classes"] == {"0": "flowing", "1": "slowed", "2": "stalled"}
    assert store.classes == {0: "flowing", 1: "slowed", 2: "stalled", -1: "unlabelled"}
    chosen = "target.classes=[stalled, flowing]", "plan.batch=8"
    data = open_data(target_config(stores["multiclass"], tmp_path, "multiclass", *chosen))
    assert (data.target.kind, data.target.classes) == ("binary", ("stalled", "flowing"))
    order = {0: 1.0, 1: -1.0, 2: 0.0}
    expected = [order[label] for label in store.table["label"].tolist()]
    assert data.labels.tolist() == expected
    assert data.dataset(training=False).labels([0, 1, 2]).tolist() == expected[:3]
    assert not (data.splits[np.array(expected) < 0] > 0).any()


def test_values_are_scaled_by_the_train_split(stores: dict[str, Path], tmp_path: Path) -> None:
    data = open_data(target_config(stores["regression"], tmp_path, "regression"), training=True)
    train_labels = data.labels_of(data.numbers("train"))
    np.testing.assert_allclose(train_labels.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train_labels.std(axis=0), 1, rtol=1e-5)
    texts = data.store.table.texts("meta:speed")
    back = data.target.truth(data.labels)[:, 0]
    np.testing.assert_allclose(back, list(map(float, texts)), rtol=1e-5, atol=1e-3)
    assert data.config.model.outputs == 2


def test_a_clip_without_a_value_takes_no_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    speed = np.arange(72).astype(object)
    speed[[3, 50]] = ""
    store = table_store(tmp_path / "store", {"speed": speed}, labelled=False, shown=False)
    config = target_config(store, tmp_path / "run", "regression", "target.columns=[speed]")
    data = open_data(config, training=True)
    assert (data.splits == 0).sum() == 2
    assert data.labels.shape == (72,)
    assert "2 of 72 clips have no speed, and take no part" in caplog.text


REFUSED = {
    "no such column": (
        "regression", ("target.columns=[sped]",), ConfigError,
        r"target.columns: the store has no column 'sped'. Did you mean 'speed'",
    ),
    "no such class": (
        "ordinal", ("target.classes=[flowing, slow, stalled]",), ConfigError,
        "no class 'slow'. Did you mean 'slowed'",
    ),
    "no labels of two values": (
        "multilabel", ("target.columns=[left, split_text]",), ConfigError, "has no column",
    ),
    "two classes of three": (
        "multiclass", ("target.kind=binary",), ConfigError, "kind binary has two classes, and",
    ),
    "no columns": ("multiclass", ("target.kind=multilabel",), ConfigError, "needs two or more col"),
    "names as values": (
        "multiclass", ("target.kind=regression",), ConfigError, "class is 'flowing', not a number",
    ),
    "a loss of another kind": (
        "multiclass", ("loss.name=bce",), ConfigError, "bce is a loss for binary and multilabel",
    ),
    "a metric of another kind": (
        "multiclass", ("checkpoint.best=val/mcc@0.5",), ConfigError,
        r"no metric 'val/mcc@0.5' for kind multiclass; there are val/loss, val/mcc, val/acc",
    ),
    "other outputs": ("multiclass", ("model.outputs=7",), ConfigError, "the target needs 3"),
    "a ratio without classes": (
        "regression", ("plan.ratio=balanced",), PlanError, "clips of kind regression have not one",
    ),
    "positives by crowd score": (
        "multiclass", ("select.tier2_crowd_score=0.5",), ConfigError, "multiclass has no positives",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(
    case: str, stores: dict[str, Path], tmp_path: Path
) -> None:
    kind, settings, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        train(target_config(stores[kind], tmp_path / "run", kind, *settings))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_class_without_a_clip_in_a_split_is_named(tmp_path: Path) -> None:
    labels = np.array(["flowing", "slowed", "stalled"])[np.arange(72) % 3]
    labels[48:66][labels[48:66] == "slowed"] = "flowing"
    store = table_store(tmp_path / "store", {"label": labels})
    with pytest.raises(
        PlanError, match=r"split 'val' holds no 'slowed' clips \(train: 16 'slowed'"
    ):
        train(target_config(store, tmp_path / "run", "multiclass"))


def test_a_checkpoint_of_another_target_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    """Both have two outputs."""
    run = tmp_path / "run"
    short = "train.epochs=1", "snapshots.at=[1]"
    train(target_config(stores["regression"], run, "regression", *short))
    other = "target.scale=[1.0, 1.0]", "train.epochs=2"
    with pytest.raises(CheckpointError, match=r"another target \(target.scale is \["):
        train(target_config(stores["regression"], run, "regression", *short, *other), resume="auto")


def test_a_model_from_outside_must_have_outputs(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from torch import nn\n"
        "class One(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = nn.Conv3d(1, 1, 3, padding=1)\n"
        "    def forward(self, volumes, frames):\n"
        "        return self.head(volumes).mean((2, 3, 4)).squeeze(1)\n"
        "class Many(nn.Module):\n"
        "    def __init__(self, outputs=1):\n"
        "        super().__init__()\n"
        "        self.head = nn.Conv3d(1, outputs, 3, padding=1)\n"
        "    def forward(self, volumes, frames):\n"
        "        return self.head(volumes).mean((2, 3, 4))\n"
    )
    (tmp_path / "nets_of_outputs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DIST_TRAIN_ALLOW", "nets_of_outputs")
    plain = [
        setting
        for setting in target_overrides(stores["multiclass"], tmp_path / "run", "multiclass")
        if not setting.startswith("model.")
    ]
    short = "train.epochs=1", "snapshots.at=[1]"
    with pytest.raises(ModelError, match="does not say that it takes 3 outputs"):
        train(_last(plain, "model.name=nets_of_outputs:One", *short))
    train(_last(plain, "model.name=nets_of_outputs:Many", *short))


def _last(settings: list[str], *more: str) -> Config:
    return load_config(None, last_of_each([*settings, *more]))
