"""Probabilities are the mean over a clip's flips, and files say so."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fails, said, trained_so
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_train.config import AugmentSettings
from dist_train.evaluation.flips import View, Viewed, views_of
from dist_train.evaluation.predict import find_snapshots
from dist_train.evaluation.prediction_origin import read_origin
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.run.data import open_data
from dist_train.run.model import make_model
from dist_train.run.record import open_run


class Seen(nn.Module):
    """Gives back the pixels that it sees."""

    def forward(self, volumes: Tensor, frames: Tensor | None) -> Tensor:
        return volumes


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_views_are_the_flips_of_the_training() -> None:
    assert len(set(views_of("flips", AugmentSettings()))) == 8
    assert len(views_of("flips", AugmentSettings(reverse=0.0))) == 4
    assert views_of("flips", AugmentSettings(flip=0.0)) == [
        View(False, False, False), View(True, False, False)
    ]  # fmt: skip
    assert views_of("none", AugmentSettings()) == [View(False, False, False)]


def test_a_view_reverses_real_frames_and_leaves_padding_behind() -> None:
    pixels = torch.rand(2, 1, 5, 4, 3)
    pixels[1, :, 3:] = 0
    for view in views_of("flips", AugmentSettings()):
        axes = [axis for axis, is_flipped in enumerate(view, start=1) if is_flipped]
        whole, cut = pixels[0].flip(axes), pixels[1, :, :3].flip(axes)
        seen = Viewed(Seen(), view)(pixels, torch.tensor([5, 3]))
        assert torch.equal(seen[0], whole)
        assert torch.equal(seen[1, :, :3], cut)
        assert not seen[1, :, 3:].any()
        assert torch.equal(Viewed(Seen(), view)(pixels[:1], None)[0], whole)


def test_the_mean_over_views_by_hand(run: Path, tmp_path: Path) -> None:
    said("predict", run)
    plain = read_predictions(run / "predictions.csv").set_index("key")
    before = (run / "predictions.json").read_text()
    assert "tta" not in before
    said("predict", run, "--tta", "flips", "--out", tmp_path / "flips")
    flipped = read_predictions(tmp_path / "flips" / "predictions.csv").set_index("key")
    origin = read_origin(tmp_path / "flips" / "predictions.csv")
    assert origin is not None
    assert origin.tta == "flips"
    assert "--tta flips" in said("evaluate", tmp_path / "flips")
    config = open_run(run)
    data, model = open_data(config), make_model(config).eval()
    (snapshot,) = find_snapshots(run)
    model.load_state_dict(load_file(snapshot))
    for clip in data.numbers("test"):
        volume = torch.from_numpy(data.store.read(clip)).float()[None, None] / 255
        axes = [[a for a, on in zip((2, 3, 4), each, strict=True) if on]
                for each in product((False, True), repeat=3)]  # fmt: skip
        with torch.no_grad():
            each = [float(model(volume.flip(a), None).double().sigmoid()) for a in axes]
        key = data.store.table["key"][clip]
        assert flipped["probability"][key] == pytest.approx(np.mean(each), abs=1e-6)
        assert plain["probability"][key] == pytest.approx(each[0], abs=1e-6)
        assert np.ptp(each) > 1e-6


def test_what_does_not_go_with_flips_is_refused(run: Path, store: Path, tmp_path: Path) -> None:
    said("predict", run, "--tta", "flips")
    told = fails("export", run, "--out", tmp_path / "model.safetensors")
    assert "the run's predictions are with --tta flips, and an export predicts without" in told
    told = fails("predict", run, "--store", store, "--out", tmp_path / "new", "--threshold", "0.5")
    assert "which give the calibration, are with --tta flips" in told
    trained_so(run, "augment.flip=0", "augment.reverse=0")
    told = fails("predict", run, "--tta", "flips")
    assert told.startswith("--tta flips: the run was trained without mirrored and reversed clips")
