"""The curve of held-out figures follows the weights, and not how BatchNorm's statistics lag."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, metrics_of, tiny_config

from dist_train.config import load_config
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare, prepare_npz
from dist_train.data.synthetic.render import synthesize
from dist_train.data.table.manifest import read_manifest
from dist_train.training.train import train


def figures(run: Path, name: str) -> np.ndarray:
    return np.array([line[name] for line in metrics_of(run) if name in line])


def deepest_fall(curve: np.ndarray) -> float:
    """How far it falls below its best so far, after its first third."""
    falls = np.maximum.accumulate(curve) - curve
    return float(falls[len(curve) // 3 :].max())


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of clips of noise, the positives brighter in the middle by a third of its spread."""
    folder = tmp_path_factory.mktemp("curve")
    random = np.random.default_rng(0)
    arrays = {}
    for split, (positives, negatives) in {
        "train": (24, 72), "val": (20, 60), "test": (4, 6)
    }.items():  # fmt: skip
        labels = random.permutation([1] * positives + [0] * negatives)
        images = random.integers(0, 120, (len(labels), 8, 16, 16), dtype=np.uint8)
        images[labels == 1, :, 5:11, 5:11] += 12
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(folder / "clips.npz", **arrays)
    prepare_npz(folder / "clips.npz", folder / "store")
    return folder / "store"


FAST = ("optim.lr=0.03", "train.epochs=6", "snapshots.at=[6]", "checkpoint.every_steps=999")


@pytest.mark.slow
def test_the_curve_is_calm_while_weights_are_fast(
    faint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny_config(faint, tmp_path / "run", *FAST))
    assert deepest_fall(figures(tmp_path / "run", "val/mcc@0.5")) <= 0.15
    assert figures(tmp_path / "run", "val/loss").max() < 1
    assert figures(tmp_path / "run", "norm/gap").max() < 0.3
    assert "norm/gap" not in caplog.text


@pytest.mark.slow
def test_statistics_that_lag_are_warned_of_once(
    faint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(tiny_config(faint, tmp_path / "run", *FAST, "norm.precise_steps=0"))
    assert (figures(tmp_path / "run", "norm/gap") > 0.3).sum() > 1
    assert figures(tmp_path / "run", "val/loss").max() > 2
    assert caplog.text.count("set norm.precise_steps, such as 4") == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_curve_of_the_demo_is_calm(
    seed: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = tmp_path_factory.getbasetemp() / "demo-data"
    if not (data / "store" / "store.json").exists():
        synthesize(data, clips=400, seed=7)
        manifest = read_manifest(data / "train_metadata.csv")
        settings = PrepareSettings(shard_clips=20)
        prepare(manifest, data / "videos", data / "store", settings)
    places = [f"store={data / 'store'}", f"out={tmp_path / 'run'}", f"seed={seed}"]
    train(load_config(ROOT / "configs" / "demo_cpu.yaml", places))
    assert deepest_fall(figures(tmp_path / "run", "val/mcc@0.5")) <= 0.15
    assert figures(tmp_path / "run", "norm/gap").max() < 0.3
