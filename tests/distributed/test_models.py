"""Models other than the ResNet, sharded over two processes: the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_losses import compare
from golden_run import golden_config, golden_overrides
from helpers import SUPPORT, metrics_of
from launcher import Launcher
from timm_stand_in import import_timm

from dist_train.training.train import train

pytestmark = pytest.mark.slow
import_timm()

TRAIN = ["train.epochs=1", "snapshots.at=[1]", "optim.ema=null", "checkpoint.every_steps=4"]
#: One of each kind of part: split convolutions, gates, depthwise convolutions, scales and layer
#: normalisation, and another library's layers. Without draws, which differ between processes.
MODELS = {
    "r2plus1d-18": ["width=4"],
    "x3d-s": ["width=8", "dropout=0"],
    "mobilenet3d": ["width=0.25", "dropout=0"],
    "convnext3d-tiny": ["width=8", "drop_path=0"],
    "densenet3d-121": [],
    "frames-lstm": ["encoder=test_resnet", "hidden=32"],
    "frames-transformer": ["encoder=test_resnet", "hidden=32"],
}
SIDE = 32
#: Relative. The last layers have few voxels, whose statistics amplify rounding.
LOSS = 5e-5
TRAINED = SUPPORT / "trained.py"


@pytest.mark.parametrize("name", MODELS)
def test_sharded_weights_give_the_losses_of_one_process(
    golden: Path, launcher: Launcher, tmp_path: Path, name: str
) -> None:
    arguments = [f"model.args.{argument}" for argument in MODELS[name]]
    settings = [
        *("model.width=64", "model.stem_pool=true", f"model.name={name}", *arguments),
        *(f"clip.size=[{SIDE}, {SIDE}]", *TRAIN),
    ]
    one = tmp_path / "one"
    train(golden_config(golden, one, *settings))
    assert len(metrics_of(one)) >= 4
    for backend in ("zero3", "fsdp2"):
        out = tmp_path / backend
        argv = golden_overrides(golden, out, *settings, f"train.backend={backend}")
        launcher.program(2, [TRAINED, *argv]).well()
        losses = compare(one, out, LOSS)
        assert losses.first is None, losses.rows
        norms = compare(one, out, 1e-2, figure="train/grad_norm")
        assert norms.first is None, norms.rows
