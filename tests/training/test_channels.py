"""Training on clips of several channels, from the store to predictions and an export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from array_store import array_store
from helpers import fails, metrics_of, said, tiny_config
from npy_store import npy_store
from short_runs import assert_same_run, train_until

from dist_train.data.augment.resize import resize
from dist_train.data.store.reader import Store
from dist_train.errors import CheckpointError, ConfigError
from dist_train.evaluation.exported import load_exported
from dist_train.run.record import open_run
from dist_train.training.train import train

pytestmark = pytest.mark.slow

TWO = ("dapi", "gfp")
# Positives and negatives of each split.
SPLITS = {"train": (12, 36), "val": (8, 12), "test": (2, 3)}
SETTINGS = ("train.epochs=6", "snapshots.at=[5, 6]", "optim.lr=0.02")


def rows() -> list[dict[str, object]]:
    return [
        {"label": label, "split": split}
        for split, (positives, negatives) in SPLITS.items()
        for label in [1] * positives + [0] * negatives
    ]


def coloured() -> list[tuple[np.ndarray, dict[str, object]]]:
    """A red blob in positives and a blue one in negatives, on grey noise. Both have luma 24."""
    random, clips = np.random.default_rng(0), []
    for row in rows():
        clip = np.repeat(random.integers(0, 40, (6, 16, 16, 1), dtype=np.uint8), 3, axis=3)
        y, x = random.integers(0, 10, 2)
        clip[:, y : y + 6, x : x + 6] += np.uint8([80, 0, 0] if row["label"] else [0, 0, 210])
        clips.append((clip, row))
    return clips


def two_channels() -> list[tuple[np.ndarray, dict[str, object]]]:
    """uint16 of unequal size: any clip may have a blob in the first channel, and positives have
    one in the second."""
    random, clips = np.random.default_rng(1), []
    for number, row in enumerate(rows()):
        shape = (5 + number % 3, 16 + number % 4, 15 + number % 5, 2)
        clip = random.integers(0, 30000, shape, dtype=np.uint16)
        for channel, has in enumerate((random.random() < 0.5, row["label"])):
            y, x = random.integers(0, 8, 2)
            clip[:, y : y + 7, x : x + 7, channel] += np.uint16(35000 * int(has))
        clips.append((clip, row))
    return clips


def best_mcc(run: Path) -> float:
    return max(line["val/mcc@0.5"] for line in metrics_of(run) if "val/mcc@0.5" in line)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return array_store(tmp_path_factory.mktemp("two") / "store", two_channels(), TWO)


@pytest.fixture(scope="module")
def trained_two(two: Path) -> Path:
    run = two.parent / "run"
    train(tiny_config(two, run, *SETTINGS, "model.stem_folded=true"))
    said("predict", run)
    return run


def test_colour_tells_the_class_and_grey_does_not(tmp_path: Path) -> None:
    store = array_store(tmp_path / "rgb", coloured(), ("red", "green", "blue"))
    train(tiny_config(store, tmp_path / "run", *SETTINGS))
    assert best_mcc(tmp_path / "run") > 0.9
    grey = npy_store(tmp_path, coloured())
    train(tiny_config(grey, tmp_path / "grey", *SETTINGS))
    assert best_mcc(tmp_path / "grey") < 0.5


def test_the_second_channel_of_a_uint16_store_tells_the_class(trained_two: Path) -> None:
    assert best_mcc(trained_two) > 0.9
    config = open_run(trained_two)
    assert config.model.channels == TWO


@pytest.mark.parametrize("device", [False, True])
def test_a_resumed_run_equals_the_straight_one(two: Path, tmp_path: Path, device: bool) -> None:
    """Also if a worker reads the clips of the second session."""
    settings = (
        "augment.distort=0.5", "augment.brightness=0.5", "augment.blur_noise=0.5",
        f"augment.device={device}", "train.epochs=2", "snapshots.at=[2]",
        "model.activation_memory=1GiB",
    )  # fmt: skip
    train(tiny_config(two, tmp_path / "straight", *settings))
    train_until(tiny_config(two, tmp_path / "run", *settings), 5)
    train(tiny_config(two, tmp_path / "run", *settings, "loader.workers=1"), resume="auto")
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def predicted(run: Path, store: Path) -> Iterator[tuple[torch.Tensor, float]]:
    """Volumes, uint16 [1, C, D, 16, 16], and their predicted probabilities."""
    opened = Store(store)
    table = pd.read_csv(run / "predictions.csv", dtype={"key": str}).set_index("key")["probability"]
    for key, probability in table.items():
        clip = resize(opened.read(opened.clip_of(str(key))), (16, 16))
        yield torch.from_numpy(np.moveaxis(clip, 3, 0)[None].copy()), probability


def test_an_export_gives_the_predictions(trained_two: Path, two: Path, tmp_path: Path) -> None:
    said("export", trained_two, "--out", tmp_path / "m.safetensors")
    exported = load_exported(tmp_path / "m.safetensors")
    assert exported.facts["model"]["channels"] == list(TWO)
    assert "dapi, gfp" in exported.facts["preprocessing"]["channels"]
    for volume, expected in predicted(trained_two, two):
        assert exported.probability(volume).item() == pytest.approx(expected, abs=1e-5)


def test_an_onnx_export_gives_the_predictions(trained_two: Path, two: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    files = ("--step", "36", "--out", tmp_path / "m.safetensors", "--onnx", tmp_path / "m.onnx")
    said("export", trained_two, *files)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    exported = load_exported(tmp_path / "m.safetensors")
    for volume, _ in predicted(trained_two, two):
        inputs = {
            "volumes": volume.numpy().astype(np.float32) / 65535,
            "frames": np.array([volume.shape[2]]),
        }
        probability, _ = session.run(None, inputs)
        expected = exported.probability(volume).item()
        assert probability.item() == pytest.approx(expected, abs=1e-5)


def test_other_channels_are_refused_by_name(trained_two: Path, two: Path, tmp_path: Path) -> None:
    other = array_store(tmp_path / "other", two_channels(), ("gfp", "dapi"))
    told = "its channels are gfp, dapi, and the model takes dapi, gfp"
    assert told in fails("predict", trained_two, "--store", other, "--out", tmp_path / "out")
    overrides = [f"store={other}", "checkpoint.accept_other_order=true"]
    resumed = ["--resume", "auto", "--config", trained_two / "config.yaml", *overrides]
    assert told in fails("train", *resumed)
    config = tiny_config(other, trained_two, *SETTINGS, overrides[1], "model.stem_folded=true")
    with pytest.raises(CheckpointError, match=r"channels is \['dapi', 'gfp'\] there and \['gfp'"):
        train(config, resume="auto")
    init = tiny_config(other, tmp_path / "new", *SETTINGS, f"model.init={trained_two}")
    with pytest.raises(ConfigError, match=r"channels is \['dapi', 'gfp'\] there and \['gfp'"):
        train(init)


def test_the_report_says_what_the_colours_are(trained_two: Path) -> None:
    """The threshold makes mistakes, so that there are pictures."""
    said("evaluate", trained_two, "--threshold", "1")
    said("report", trained_two)
    page = (trained_two / "report.html").read_text()
    assert page.count("dapi red, gfp green") >= 2
