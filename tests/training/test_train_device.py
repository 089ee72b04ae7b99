"""Clips of unequal size are resized and augmented on the device: training, resuming, predicting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config
from npy_store import npy_store
from short_runs import assert_same_run, train_until

from dist_train.config import dump_config, load_config
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
    random = np.random.default_rng(0)

    def clip(number: int) -> tuple[np.ndarray, dict[str, object]]:
        depth, height, width = 5 + number % 4, *random.integers(10, 25, 2)
        pixels = random.integers(0, 120, (depth, height, width), dtype=np.uint8)
        label = int(number % 3 == 0)
        pixels[:, height // 3 : -height // 3, width // 3 : -width // 3] += np.uint8(100 * label)
        return pixels, {"label": label, "split": SPLITS[number // 9]}

    return npy_store(tmp_path_factory.mktemp("device"), map(clip, range(54)))


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
    train_until(config, 3)
    train(tiny_config(store, tmp_path / "run", *SETTINGS, "loader.workers=1"), resume="auto")
    assert_same_run(config.out, straight)


def test_predictions_are_those_of_clips_resized_on_the_host(straight: Path) -> None:
    """The host rounds to grey levels."""
    settings = (straight / CONFIG).read_text()
    there = read_predictions(predict(straight))["probability"].to_numpy()
    dump_config(load_config(straight / CONFIG, ["augment.device=false"]), straight / CONFIG)
    here = read_predictions(predict(straight))["probability"].to_numpy()
    (straight / CONFIG).write_text(settings)
    assert len(there) == 18
    assert there.std() > 0.02
    assert 0 < np.abs(here - there).max() < 0.02
