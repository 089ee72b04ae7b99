"""The curve of validation metrics follows the weights, and not BatchNorm's lagging statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import metrics_of, tiny_config
from npy_store import npy_store

from dist_train.training.train import train


def curve(run: Path, name: str) -> np.ndarray:
    return np.array([line[name] for line in metrics_of(run) if name in line])


def deepest_fall(values: np.ndarray) -> float:
    """How far the values fall below their best so far, after the first third."""
    falls = np.maximum.accumulate(values) - values
    return float(falls[len(values) // 3 :].max())


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of clips of noise, the positives brighter in the middle by a third of its spread."""
    random = np.random.default_rng(0)
    sizes = {"train": (24, 72), "val": (20, 60), "test": (4, 6)}
    clips = []
    for split, (positives, negatives) in sizes.items():
        for label in random.permutation([1] * positives + [0] * negatives):
            pixels = random.integers(0, 120, (8, 16, 16), dtype=np.uint8)
            pixels[:, 5:11, 5:11] += np.uint8(12 * label)
            clips.append((pixels, {"label": label, "split": split}))
    return npy_store(tmp_path_factory.mktemp("curve"), clips)


FAST = ("optim.lr=0.03", "train.epochs=6", "snapshots.at=[6]", "checkpoint.every_steps=999")


@pytest.mark.slow
def test_the_curve_is_calm_by_precise_statistics_alone(
    faint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Statistics that lag behind fast weights make it jump, and one warning says so."""
    calm, lagging = tmp_path / "calm", tmp_path / "lagging"
    train(tiny_config(faint, calm, *FAST))
    assert deepest_fall(curve(calm, "val/mcc@0.5")) <= 0.15
    assert curve(calm, "val/loss").max() < 1
    assert curve(calm, "norm/gap").max() < 0.3
    assert "norm/gap" not in caplog.text
    train(tiny_config(faint, lagging, *FAST, "norm.precise_steps=0"))
    assert (curve(lagging, "norm/gap") > 0.3).sum() > 1
    assert curve(lagging, "val/loss").max() > 2
    assert caplog.text.count("set norm.precise_steps, such as 4") == 1
