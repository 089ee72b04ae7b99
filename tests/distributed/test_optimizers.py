"""SGD and LAMB on two processes: the losses of one, and a resumed run that equals the straight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare_losses import compare
from golden_run import STEPS, golden_config, golden_overrides
from helpers import SUPPORT, cut, metrics_of
from launcher import Launcher

from dist_train.checkpoint.format import load_checkpoint
from dist_train.training.train import train

pytestmark = pytest.mark.slow

TRAINED = SUPPORT / "trained.py"
#: Rates at which a step moves the weights about as far as in the golden run.
RATES = {"sgd": "optim.lr=1e-3", "lamb": "optim.lr=1e-4"}
#: A DDP process holds all moments, as one process alone does.
CASES = [
    pytest.param("sgd", "ddp", marks=pytest.mark.soak),
    ("sgd", "zero2"),
    ("sgd", "zero3"),
    ("sgd", "fsdp2"),
    pytest.param("lamb", "ddp", marks=pytest.mark.soak),
    ("lamb", "fsdp2"),
]


@pytest.fixture(scope="module")
def one(golden: Path) -> dict[str, Path]:
    """The run of each optimizer on one process; not to be changed."""
    runs = {name: golden.parent / f"one-{name}" for name in RATES}
    for name, out in runs.items():
        train(golden_config(golden, out, f"optim.name={name}", RATES[name]))
    return runs


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_two_processes_train_as_one(
    name: str,
    backend: str,
    golden: Path,
    one: dict[str, Path],
    launcher: Launcher,
    tmp_path: Path,
) -> None:
    out = tmp_path / "two"
    more = (f"optim.name={name}", RATES[name], f"train.backend={backend}")
    launcher.program(2, [TRAINED, *golden_overrides(golden, out, *more)]).well()
    compared = compare(out, one[name], 1e-5)
    assert len(compared.rows) == STEPS
    assert compared.first is None, compared.rows
    mine, theirs = (
        load_checkpoint(run / "checkpoints" / f"step-{STEPS}")[0] for run in (out, one[name])
    )
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        scale = torch.linalg.vector_norm(theirs[key].double())
        assert torch.linalg.vector_norm((tensor - theirs[key]).double()) <= 1e-2 * scale, key

    resumed = cut(out, tmp_path / "resumed", after=4)
    argv = [TRAINED, "--resume", "auto", *golden_overrides(golden, resumed, *more)]
    launcher.program(2, argv).well()
    assert metrics_of(resumed) == metrics_of(out)
    again = load_checkpoint(resumed / "checkpoints" / f"step-{STEPS}")[0]
    for key, tensor in mine.items():
        assert torch.equal(tensor, again[key]), key
