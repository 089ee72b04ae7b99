"""Training on each kind of target, from the table of clips to the metrics of held-out clips."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import fails, metrics_of
from targets import SETTINGS, target_config, target_store

from dist_train.class_metrics import METRICS_OF
from dist_train.run.record import read_record
from dist_train.training.train import train

MAIN = {
    "npz": ("accuracy", 0.8),
    "multiclass": ("accuracy", 0.8),
    "ordinal": ("qwk", 0.7),
    "multilabel": ("auc", 0.9),
    "regression": ("r2", 0.5),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_short_run_learns(kind: str, tmp_path: Path) -> None:
    store = target_store(tmp_path / "store", kind)
    run = tmp_path / "run"
    told: list[str] = []
    train(target_config(store, run, kind, "train.epochs=8", "snapshots.at=[8]"), say=told.append)
    lines = metrics_of(run)
    name, least = MAIN[kind]
    own = METRICS_OF["multiclass" if kind == "npz" else kind]
    assert {f"val/{metric}" for metric in own} <= lines[-1].keys()
    print(kind, [line[f"val/{name}"] for line in lines if f"val/{name}" in line])
    assert max(line.get(f"val/{name}", -9.0) for line in lines) > least
    assert read_record(run)["target"]["kind"] == ("multiclass" if kind == "npz" else kind)
    for command in ("predict", "report"):
        assert "its target is of kind" in fails(command, run)
