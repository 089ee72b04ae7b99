"""Fine-tuning by every backend: the losses of one process, frozen weights to the bit, and exact
resumption in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import SUPPORT, cut, losses_of, metrics_of, overrides, tiny_config
from launcher import Launcher
from safetensors.torch import load_file

from dist_train.checkpoint.format import load_checkpoint
from dist_train.training.train import train

pytestmark = pytest.mark.slow

TRAINED = SUPPORT / "trained.py"
STEPS, LEFT_AT = 12, 8
SETTINGS = (
    "train.epochs=2",
    "snapshots.at=[2]",
    "optim.ema=0.9",
    "optim.clip_norm=null",
    "checkpoint.keep_last=9",
    "finetune.freeze=[stem, layer1, layer3]",
    "finetune.layer_decay=0.5",
    "finetune.head_lr=0.02",
)


@pytest.fixture(scope="module")
def alone(store: Path, trained: Path) -> Path:
    """The run of one process."""
    out = store.parent / "finetuned"
    train(tiny_config(store, out, *SETTINGS, f"model.init={trained}"))
    return out


@pytest.mark.parametrize(
    "backend", ["ddp", pytest.param("zero1", marks=pytest.mark.soak), "zero2", "zero3", "fsdp2"]
)
def test_each_backend_trains_the_same_and_resumes_exactly(
    backend: str, alone: Path, store: Path, trained: Path, launcher: Launcher, tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    more = (*SETTINGS, f"model.init={trained}", f"train.backend={backend}")
    launcher.program(2, [TRAINED, *overrides(store, straight, *more)]).well()
    # Two processes add up in another order.
    assert losses_of(straight) == pytest.approx(losses_of(alone), rel=1e-4)

    resumed = cut(straight, tmp_path / "resumed", after=LEFT_AT)
    launcher.program(2, [TRAINED, "--resume", "auto", *overrides(store, resumed, *more)]).well()
    assert metrics_of(resumed) == metrics_of(straight)
    mine, theirs = (
        load_checkpoint(run / "checkpoints" / f"step-{STEPS}")[0] for run in (resumed, straight)
    )
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name

    # Layers 1 and 3 of a resnet3d-10 are its blocks 0 and 2.
    frozen = ("stem.", "blocks.0.", "blocks.2.")
    given = load_file(trained / "snapshots" / "step-6.safetensors")
    assert not any(n.partition("/")[2].startswith(frozen) for n in mine if n.startswith("exp_avg"))
    for name, tensor in given.items():
        same = torch.equal(mine[f"model/{name}"], tensor)
        assert same == name.startswith(frozen), name
        if tensor.is_floating_point() and same:
            torch.testing.assert_close(mine[f"ema/{name}"], tensor, rtol=1e-6, atol=1e-7)
