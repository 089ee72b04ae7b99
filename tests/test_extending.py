"""docs/extending.md does what it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, overrides, said, tiny_store

from dist_train import cli
from dist_train.config import AugmentSettings, LossSettings, TrainSettings, load_config
from dist_train.data.augment.cpu import augmented
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.stack import Choices
from dist_train.distributed.backends import make_backend
from dist_train.extensions import ALLOW
from dist_train.metrics import METRICS, binary_metrics
from dist_train.models.registry import MODELS, build_model
from dist_train.training.losses import LOSSES, make_loss

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.slow
def test_the_examples_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    for registry in (METRICS, LOSSES, MODELS):
        # Restores what the examples add.
        stack.enter_context(mock.patch.dict(registry))
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    module = ModuleType("mylab")
    module.__file__ = str(tmp_path / "mylab.py")
    monkeypatch.setitem(sys.modules, "mylab", module)
    monkeypatch.setenv(ALLOW, "mylab")
    for block in BLOCKS:
        assert len(block.strip().splitlines()) <= 12
        exec(compile(block, "docs/extending.md", "exec"), module.__dict__)

    np.zeros(512, np.uint8).tofile(tmp_path / "a.raw")
    assert OutsideReader.named("mylab:read_raw").read(tmp_path / "a.raw", Choices()).count == 2
    assert build_model("net", channels=2)(torch.zeros(3, 1, 4, 8, 8), None).shape == (3,)
    logits, labels = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])
    by_path = make_loss(LossSettings(name="mylab:hard", args={"power": 0.0}))(logits, labels)
    assert float(by_path) == pytest.approx(float(make_loss(LossSettings())(logits, labels)))
    assert make_loss(LossSettings(name="hard"))(logits, labels) < by_path
    assert binary_metrics([0.0, 0.5], [0, 1])["brier"] == pytest.approx(0.125)
    assert load_config(None, ["store=s", "checkpoint.best=val/brier"]).checkpoint.best
    assert module.MixSettings(share=0.5).share == 0.5
    draw = module.DarkerSampler(AugmentSettings(), seed=0)((8, 8), epoch=0, number=0)
    assert augmented(np.full((2, 8, 8), 50, np.uint8), draw).mean() == 30
    monkeypatch.setitem(sys.modules, "dist_train.distributed.backends.counting", module)
    counting = TrainSettings(device="cpu").model_copy(update={"backend": "counting"})
    backend = make_backend(counting, clip_norm=None)
    backend.close()
    assert isinstance(backend, module.CountingBackend)
    assert said("hello", "you") == "hello you\n"

    store, run = tiny_store(tmp_path / "store"), tmp_path / "run"
    plain = ("model.width=64", "model.stem_pool=true", "train.epochs=1", "snapshots.at=[1]")
    own = ("model.name=mylab:Net", "model.args.channels=2", "loss.name=mylab:hard")
    said("train", *overrides(store, run, *plain, *own))
    assert '"val/brier"' in (run / "metrics.jsonl").read_text()
