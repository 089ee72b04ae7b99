"""A run whose clips are resampled to one spacing: plan, batches, predictions, export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from array_store import array_store
from helpers import fails, said, tiny_config

from dist_train.config import load_config
from dist_train.errors import StoreError
from dist_train.evaluation.exported import load_exported
from dist_train.run.data import open_data
from dist_train.training.train import train
from dist_train.training.trainer import Trainer

SPACING = "clip.spacing=[1.0, 2.0, 2.0]"
SPLITS = {"train": (4, 12), "val": (2, 4), "test": (1, 3)}


def make(folder: Path, about: dict[str, object]) -> Path:
    """Clips of 4 to 6 frames, 2 um apart, of 16x16 pixels of 1 um."""
    random, clips = np.random.default_rng(0), []
    for split, counts in SPLITS.items():
        for label in (1, 0):
            for number in range(counts[1 - label]):
                shape = (4 + number % 3, 16, 16)
                clip = random.integers(0, 120, shape, dtype=np.uint8)
                clip[:, 5:11, 5:11] += np.uint8(100 * label)
                clips.append((clip, {"label": label, "split": split}))
    return array_store(folder, clips, about=about)


@pytest.mark.slow
def test_the_run_sees_clips_of_one_spacing(tmp_path: Path) -> None:
    store = make(tmp_path / "store", {"spacing": [2.0, 1.0, 1.0]})
    settings = (SPACING, "clip.size=[8, 8]", "train.epochs=1", "snapshots.at=[1]")
    config = tiny_config(store, tmp_path / "run", *settings)
    data = open_data(config)
    assert data.deepest() == 12
    assert set(data.frames.tolist()) == {8, 10, 12}
    seen = []

    def look(trainer: Trainer, step: int) -> None:
        seen.append(next(iter(trainer.batches.last_steps(step + 1, 1))).volumes.shape[2:])

    train(config, before_step=look)
    assert {(d, 8, 8) for d in (8, 10, 12)} >= set(map(tuple, seen))
    said("predict", tmp_path / "run")
    said("export", tmp_path / "run", "--out", tmp_path / "m.safetensors")
    facts = load_exported(tmp_path / "m.safetensors").facts
    assert facts["clip"]["spacing"] == [1.0, 2.0, 2.0]
    assert "resampled to 1 um" in facts["preprocessing"]["depth"]
    assert "to pixels of 2 by 2 um" in facts["preprocessing"]["resize"]

    bare = make(tmp_path / "bare", {})
    told = "26 of 26 clips do not say their spacing, the first is 0000.npy"
    assert told in fails("predict", tmp_path / "run", "--store", bare, "--out", tmp_path / "out")
    bare_run = tiny_config(bare, tmp_path / "other", *settings)
    with pytest.raises(StoreError, match=told):
        train(bare_run)


def test_smaller_clips_of_a_stage_show_as_much() -> None:
    stages = "clip.growth=[{epochs: 2, size: [4, 2]}]"
    clip = load_config(None, ["store=s", SPACING, "clip.size=[8, 8]", stages]).clip
    assert clip.at(1).spacing == (1.0, 4.0, 8.0)
    assert clip.at(2).spacing == (1.0, 2.0, 2.0)
