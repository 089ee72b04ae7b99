"""Models other than the ResNet, sharded over two processes: the losses of one process."""

from __future__ import annotations

import json
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
#: Relative. The last layers have few voxels, whose statistics amplify rounding: the order of the
#: clips of a batch alone moves the first loss of r2plus1d-18 by 7e-6 in float32, by 5e-15 in
#: float64, and its gradients by 1 % and by 1e-13. Processes add up statistics in another order.
LOSS, GRADIENT = 5e-5, 5e-2
#: Against processes that each hold all weights, whose statistics are added up in the same order.
SHARDED_LOSS, SHARDED_GRADIENT = 1e-6, 1e-2
TRAINED = SUPPORT / "trained.py"
SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("convnext3d-tiny", "frames-lstm") else SOAK)
        for name in MODELS
    ],
)
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
    runs = {backend: tmp_path / backend for backend in ("ddp", "zero3", "fsdp2")}
    for backend, run in runs.items():
        argv = golden_overrides(golden, run, *settings, f"train.backend={backend}")
        launcher.program(2, [TRAINED, *argv]).well()
        assert_same(one, run, LOSS, GRADIENT)
        facts = [json.loads(f.read_text()) for f in Path(f"{run}-facts").glob("rank-*.json")]
        engines = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}
        assert all(fact["engine"].startswith(engines[backend]) for fact in facts), facts
        held = [fact["weights_held"] / fact["parameters"] for fact in facts]
        assert held == pytest.approx([1.0 if backend == "ddp" else 0.5] * 2, rel=0.1)
        assert_same(runs["ddp"], run, SHARDED_LOSS, SHARDED_GRADIENT)


def assert_same(a: Path, b: Path, loss: float, gradient: float) -> None:
    """That all steps' losses and norms of gradients differ by no more."""
    for figure, tolerance in (("train/loss", loss), ("train/grad_norm", gradient)):
        compared = compare(a, b, tolerance, figure=figure)
        assert compared.first is None, (b.name, figure, compared.rows)
