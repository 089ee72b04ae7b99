"""Clips of unequal size are resized and augmented on the device: training, resuming, predicting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import InterruptedSessionError, interrupt_at, metrics_of, tiny_config

from dist_train.config import dump_config, load_config
from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.table.manifest import read_manifest
from dist_train.evaluation.evaluate import evaluate
from dist_train.evaluation.predict import predict
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.run.folder import CONFIG
from dist_train.training.train import train

SPLITS = ("train", "train", "train", "train", "val", "test")
SETTINGS = (
    "augment.device=true", "augment.shift_scale_rotate=0.5", "augment.distort=0.5",
    "augment.brightness=0.5", "augment.blur_noise=0.5", "clip.max_frames=7", "plan.batch=16",
    "checkpoint.every_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of unequal depth, height and width; the positives have a bright middle."""
    folder = tmp_path_factory.mktemp("device")
    random = np.random.default_rng(0)
    (folder / "raw").mkdir()
    rows = ["filename,label,split"]
    for number in range(54):
        depth, height, width = 5 + number % 4, *random.integers(10, 25, 2)
        clip = random.integers(0, 120, (depth, height, width), dtype=np.uint8)
        label = int(number % 3 == 0)
        clip[:, height // 3 : -height // 3, width // 3 : -width // 3] += np.uint8(100 * label)
        np.save(folder / "raw" / f"{number}.npy", clip)
        rows.append(f"{number}.npy,{label},{SPLITS[number // 9]}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    manifest = read_manifest(folder / "clips.csv")
    settings = PrepareSettings(roi="none")
    prepare(manifest, folder / "raw", folder / "store", settings, workers=1)
    return folder / "store"


@pytest.fixture(scope="module")
def straight(store: Path) -> Path:
    out = store.parent / "straight"
    train(tiny_config(store, out, *SETTINGS))
    return out


@pytest.mark.slow
def test_a_resumed_run_with_a_worker_equals_the_straight_one_without(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny_config(store, tmp_path / "run", *SETTINGS)
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(3))
    train(tiny_config(store, tmp_path / "run", *SETTINGS, "loader.workers=1"), resume="auto")
    assert metrics_of(tmp_path / "run") == metrics_of(straight)
    snapshots = sorted((straight / "snapshots").iterdir())
    assert len(snapshots) == 2
    for path in snapshots:
        assert (tmp_path / "run" / "snapshots" / path.name).read_bytes() == path.read_bytes()


def probabilities_of(run: Path) -> np.ndarray:
    """What ``predict`` says now."""
    return read_predictions(predict(run))["probability"].to_numpy()


def test_predictions_are_those_of_clips_resized_on_the_host(straight: Path) -> None:
    """Which rounds to grey levels."""
    there = probabilities_of(straight)
    assert len(there) == 18
    assert evaluate(straight / "predictions.csv").clips == 9
    settings = (straight / CONFIG).read_text()
    dump_config(load_config(straight / CONFIG, ["augment.device=false"]), straight / CONFIG)
    here = probabilities_of(straight)
    (straight / CONFIG).write_text(settings)
    assert there.std() > 0.02
    assert 0 < np.abs(here - there).max() < 0.02
