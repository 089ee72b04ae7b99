"""Weights are used only if they are the ones that the run wrote, and the run is as it was."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import fails, tiny_config

from dist_train.errors import DistTrainError, RunError
from dist_train.evaluation.predict import predict
from dist_train.run.model import make_model
from dist_train.run.record import open_run, read_record
from dist_train.run.snapshots import load_into, load_snapshot, save_snapshot, snapshot_metadata
from dist_train.training.train import train

STEP = 6


@pytest.fixture(scope="module")
def trained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one snapshot and predictions; not to be changed."""
    out = Path(shutil.copytree(trained, tmp_path_factory.mktemp("snapshots") / "run"))
    predict(out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def snapshot_of(run: Path) -> Path:
    return run / "snapshots" / f"step-{STEP}.safetensors"


def test_a_snapshot_says_what_its_weights_were_trained_on(trained: Path) -> None:
    facts = load_snapshot(snapshot_of(trained)).facts
    record = read_record(trained)
    assert facts == snapshot_metadata(open_run(trained), STEP, record["store"]["content"])
    assert facts["clip"] == {"size": [16, 16], "max_frames": None}


def test_a_flipped_bit_is_noticed(trained: Path, tmp_path: Path) -> None:
    """Half of the bits in the header, which is a small part of the file."""
    path = tmp_path / "step-6.safetensors"
    content = bytearray(snapshot_of(trained).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for number in range(100):
        place, bit = rng.randrange(header if number % 2 else len(content)), 1 << rng.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        content[place] ^= bit
        with pytest.raises(RunError, match=r"step-6\.safetensors: the snapshot cannot be used"):
            load_snapshot(path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), r"head\.bias is not finite"),
        # Both terms of the head are finite, and their sum is not.
        (torch.finfo(torch.float32).max, r"the snapshot gives \d+ of \d+ outputs that are not fin"),
    ],
)
def test_weights_or_outputs_that_are_not_finite_replace_nothing(
    run: Path, value: float, told: str
) -> None:
    weights, facts = load_snapshot(snapshot_of(run))
    weights["head.bias"].fill_(value)
    weights["head.weight"].fill_(value)
    save_snapshot(snapshot_of(run), weights, facts)
    before = {name: (run / name).read_bytes() for name in ("predictions.csv", "submission.csv")}
    with pytest.raises(RunError, match=told):
        predict(run)
    assert before == {name: (run / name).read_bytes() for name in before}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("step", "6", "step: '6' in the file, 6 in the run"),
        ("store", "0" * 64, "store: '0000"),
        ("clip", {"size": [32, 32], "max_frames": None}, r"clip.size: \[32, 32\] in the file"),
        ("data", {"seed": 3}, "data.seed: 3 in the file, 0 in the run"),
        ("model", {"width": 64}, "model.width: 64 in the file, 4 in the run"),
    ],
)
def test_a_snapshot_of_another_run_is_refused(
    run: Path, name: str, value: object, told: str
) -> None:
    weights, facts = load_snapshot(snapshot_of(run))
    save_snapshot(snapshot_of(run), weights, facts | {name: value})
    config, record = open_run(run), read_record(run)
    with pytest.raises(RunError, match=told):
        load_into(make_model(config), snapshot_of(run), config, record)


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("stem_pool: false", "stem_pool: true", "model.stem_pool: False before, True now"),
        ("  fold: 0", "  fold: 1", "split.fold: 0 before, 1 now"),
        ("tier2_crowd_score: null", "tier2_crowd_score: 0.5", "select.tier2_crowd_score: None"),
        ("  size:\n  - 16", "  size:\n  - 24", r"clip.size: (16, 16) before, (24, 16) now"),
    ],
)
def test_settings_that_were_edited_after_training_are_named(
    run: Path, was: str, now: str, told: str
) -> None:
    path = run / "config.yaml"
    text = path.read_text()
    assert text.count(was) == 1
    path.write_text(text.replace(was, now))
    for command in (
        ("predict", run), ("evaluate", run), ("report", run), ("export", run, "--out", run / "m")
    ):  # fmt: skip
        message = fails(*command)
        assert message.startswith(f"{path}: the settings are not those that the run was trained")
        assert told in message


def test_settings_of_how_a_machine_works_may_be_edited(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text("# moved\n" + path.read_text().replace("prefetch: 4", "prefetch: 2"))
    assert open_run(run).loader.prefetch == 2


def test_clips_cut_otherwise_after_a_resumption_are_told(
    store: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("train.epochs=2", "snapshots.at=[1, 2]", "clip.max_frames=16")
    train(tiny_config(store, run, *more), resume="auto")
    assert "clip.max_frames: None before, 16 now" in str(read_record(run)["sessions"][-1])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        predict(run)
    assert "clip.max_frames: None in the file, 16 in the run" in caplog.text


def test_a_changed_record_is_noticed(run: Path) -> None:
    path = run / "run.json"
    path.write_text(path.read_text().replace('"natural": 0.3', '"natural": 0.4'))
    with pytest.raises(DistTrainError, match="it is not as it was written"):
        predict(run)
