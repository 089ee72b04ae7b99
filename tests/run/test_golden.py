"""A store, a run, its checkpoint and an export that an earlier version wrote still open."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, metrics_of, said
from safetensors.numpy import load_file

from dist_train.data.store.reader import Store
from dist_train.evaluation.exported import load_exported
from dist_train.run.record import read_record

GOLDEN = ROOT / "tests" / "golden" / "written_before"
#: CPUs round differently; the weights of the checkpoint are far from a sign that could flip.
TOLERANCE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, which is also the working folder: the run names its store by a relative path."""
    folder = tmp_path / "old"
    shutil.copytree(GOLDEN, folder)
    monkeypatch.chdir(folder)
    return folder


def predicted(run: Path) -> pd.Series:
    return pd.read_csv(run / "predictions.csv").set_index("key")["probability"]


def test_a_store_is_whole(old: Path) -> None:
    said("verify", old / "store")


def test_a_run_predicts(old: Path) -> None:
    before = predicted(old / "run")
    said("predict", old / "run")
    after = predicted(old / "run")
    assert list(after.index) == list(before.index)
    np.testing.assert_allclose(after, before, **TOLERANCE)


def test_a_run_resumes(old: Path) -> None:
    snapshot = old / "run" / "snapshots" / "step-6.safetensors"
    before = load_file(snapshot)
    said("train", "--config", old / "run" / "config.yaml", "--resume", "auto")
    after = load_file(snapshot)
    assert after.keys() == before.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=0, atol=2e-3, err_msg=name)
    assert [line["step"] for line in metrics_of(old / "run")] == [1, 2, 3, 4, 5, 6]
    assert read_record(old / "run")["sessions"][-1]["resumed_from_step"] == 4


def test_an_export_predicts(old: Path) -> None:
    before = predicted(old / "run")
    exported = load_exported(old / "model.safetensors")
    store = Store(old / "store")
    for key, probability in before.items():
        clip = torch.from_numpy(store.read(store.clip_of(str(key))).copy())
        (after,) = exported.probability(clip[None, None])
        assert after == pytest.approx(probability, abs=TOLERANCE["atol"])
