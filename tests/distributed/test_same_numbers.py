"""One golden run of 8 steps, on one process and by every backend on many: the same losses.

Each run is made once. The tests check that the backend really ran, that losses and gradient norms
are those of one process, and that another backend can resume it. ``make test`` runs each backend,
number of processes, accumulation and offload at least once, and each backend on either side of a
hand-over; ``make soak`` runs every combination.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from compare_losses import compare
from golden_run import GOLDEN, STEPS, golden_config, golden_overrides
from helpers import SUPPORT, cut, metrics_of
from launcher import Launcher
from safetensors.torch import load_file

from dist_train.checkpoint.format import load_checkpoint
from dist_train.training.train import train

pytestmark = pytest.mark.slow

TRAINED = SUPPORT / "trained.py"

BACKENDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# Relative. Losses, which float32 knows to some 5e-7 here, by DDP and by backends that add up in yet
# other orders.
LOSS = {backend: 1e-6 if backend == "ddp" else 2e-6 for backend in BACKENDS}
# Of gradient norms, in most steps, and where rounding decides whether an activation is rectified
# (see golden_run.py).
NORM, NORM_AT_ZERO = 1e-5, 1e-2
#: Of the golden file, also where another CPU rounds in other places (see golden_run.py).
ELSEWHERE = 1e-5


@dataclass(frozen=True)
class Launch:
    world: int
    backend: str
    accumulate: int = 1
    offload: bool = False

    def __str__(self) -> str:
        offload = "-offload" if self.offload else ""
        return f"{self.world}x{self.backend}{offload}-accumulate{self.accumulate}"

    @property
    def settings(self) -> list[str]:
        return [
            f"train.backend={self.backend}",
            f"train.accumulate={self.accumulate}",
            f"train.offload={str(self.offload).lower()}",
        ]


#: Each backend, number of processes, accumulation and offload at least once.
COVERING = [
    Launch(4, "ddp", accumulate=2),
    Launch(2, "zero1", accumulate=2),
    Launch(4, "zero2"),
    Launch(2, "zero3", offload=True),
    Launch(4, "fsdp2"),
]
EVERY = [
    Launch(world, backend, accumulate, offload)
    for world in (2, 4)
    for backend in BACKENDS
    for accumulate in (1, 2)
    for offload in ((False, True) if backend.startswith("zero") else (False,))
]
each_launch = pytest.mark.parametrize(
    "launch",
    [
        *COVERING,
        *(pytest.param(la, marks=pytest.mark.soak) for la in EVERY if la not in COVERING),
    ],
    ids=str,
)
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def one(golden: Path) -> dict[int, Path]:
    """The golden run on one process, by micro-batches in a step; not to be changed."""
    runs = {accumulate: golden.parent / f"one-{accumulate}" for accumulate in (1, 2)}
    for accumulate, out in runs.items():
        train(golden_config(golden, out, f"train.accumulate={accumulate}"))
    return runs


@pytest.fixture(scope="module")
def made(golden: Path, launcher: Launcher) -> Made:
    """The run of a launch; made once, and not to be changed."""

    def make(launch: Launch) -> Path:
        out = golden.parent / str(launch)
        if not out.exists():
            argv = [TRAINED, *golden_overrides(golden, out, *launch.settings)]
            launcher.program(launch.world, argv).well()
        return out

    return make


def assert_same(run: Path, other: Path, loss: float, steps: tuple[int, int] = (1, STEPS)) -> None:
    losses = compare(run, other, loss, steps=steps)
    assert losses.first is None, losses.rows
    norms = compare(run, other, NORM_AT_ZERO, figure="train/grad_norm", steps=steps)
    assert norms.first is None, norms.rows
    assert median(far for *_, far in norms.rows) <= NORM, norms.rows


def test_golden_losses(one: dict[int, Path]) -> None:
    compared = compare(GOLDEN, one[1], ELSEWHERE)
    assert len(compared.rows) == STEPS
    assert compared.first is None, compared.worst


@pytest.mark.parametrize(
    "launch",
    [Launch(2, "zero3"), pytest.param(Launch(2, "fsdp2"), marks=pytest.mark.soak)],
    ids=str,
)
def test_losses_of_mixed_clips_and_a_teacher(
    golden: Path, one: dict[int, Path], launcher: Launcher, launch: Launch
) -> None:
    """A teacher is whole on each process, and clips are mixed within their groups."""
    more = [f"loss.distill.teacher={one[1]}", "augment.mixup=0.5", "augment.cutmix=0.5"]
    straight, out = golden.parent / "distilled", golden.parent / f"distilled-{launch}"
    if not straight.exists():
        train(golden_config(golden, straight, *more))
    assert compare(one[1], straight, ELSEWHERE).first is not None
    argv = [TRAINED, *golden_overrides(golden, out, *launch.settings, *more)]
    launcher.program(launch.world, argv).well()
    assert_same(out, straight, LOSS[launch.backend])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
@pytest.mark.parametrize(
    "backend",
    [
        "fsdp2",
        pytest.param("ddp", marks=pytest.mark.soak),
        pytest.param("zero3", marks=pytest.mark.soak),
    ],
)
def test_losses_by_compiled_norms(
    golden: Path, one: dict[int, Path], launcher: Launcher, backend: str
) -> None:
    """Statistics shared by two processes, and weights that lie in pieces but for a layer's time."""
    out = golden.parent / f"fused-{backend}"
    settings = "norm.fused=true", f"train.backend={backend}"
    launcher.program(2, [TRAINED, *golden_overrides(golden, out, *settings)]).well()
    assert_same(out, one[1], ELSEWHERE)


@each_launch
def test_losses_are_those_of_one_process(launch: Launch, one: dict[int, Path], made: Made) -> None:
    tolerance = LOSS[launch.backend]
    assert_same(made(launch), one[launch.accumulate], tolerance)
    # And so are the statistics of all processes' clips, by which held-out clips are judged.
    for figure in ("val/loss", "val/auc", "train/auc"):
        compared = compare(made(launch), one[launch.accumulate], tolerance, figure=figure)
        assert compared.first is None, f"{figure}: {compared.rows}"
    # A difference of two losses.
    gaps, expected = (
        [line["norm/gap"] for line in metrics_of(run) if "norm/gap" in line]
        for run in (made(launch), one[launch.accumulate])
    )
    assert gaps == pytest.approx(expected, abs=1e-4)
    assert min(map(abs, expected)) > 1e-3


def test_the_statistics_of_a_snapshot_are_of_the_clips_of_all_processes(
    golden: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """Also where each process normalises by its own: then its clips are what one process has in a
    micro-batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(golden_config(golden, one, "norm.precise_steps=2", "train.accumulate=2"))
    settings = "norm.precise_steps=2", "norm.shared=false"
    launcher.program(2, [TRAINED, *golden_overrides(golden, two, *settings)]).well()
    expected, found = (load_file(r / "snapshots" / f"step-{STEPS}.safetensors") for r in (one, two))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def facts_of(run: Path) -> list[dict[str, Any]]:
    files = sorted(Path(f"{run}-facts").glob("rank-*.json"))
    return [json.loads(file.read_text()) for file in files]


@each_launch
def test_the_backend_asked_for_was_at_work(launch: Launch, made: Made) -> None:
    facts = facts_of(made(launch))
    (session,) = json.loads((made(launch) / "run.json").read_text())["sessions"]
    assert (session["world_size"], session["backend"]) == (launch.world, launch.backend)
    assert len(facts) == launch.world
    assert len({fact["seed"] for fact in facts}) == launch.world, "each rank drops out on its own"
    zero, sharded = launch.backend.startswith("zero"), launch.backend in ("zero3", "fsdp2")
    engine = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPResNet3D"}
    parameters = facts[0]["parameters"]
    for fact in facts:
        assert fact["engine"] == ("DeepSpeedEngine" if zero else engine[launch.backend])
        assert fact["stage"] == (int(launch.backend[-1]) if zero else 0)
        assert fact["partitions_gradients"] == (launch.backend in ("zero2", "zero3"))
        assert fact["offloads"] == launch.offload
        assert fact["dtypes"] == ["torch.float32"]
        for name, is_spread in (
            ("weights_held", sharded), ("moments_held", launch.backend != "ddp")
        ):  # fmt: skip
            share = parameters / launch.world if is_spread else parameters
            # Tensors that do not divide are padded, or lie unevenly.
            assert fact[name] == pytest.approx(share, rel=0.1), name
    if launch.backend == "fsdp2":
        assert sum(fact["weights_held"] for fact in facts) == parameters


# From one number of processes, or backend, to another.

HANDED_OVER_AT = 2
AFTER = (HANDED_OVER_AT + 1, STEPS)
#: Each backend hands over once, and takes over once.
RING = [
    (Launch(4, "ddp", accumulate=2), Launch(2, "zero3")),
    (Launch(2, "zero1", accumulate=2), Launch(2, "fsdp2")),
    (Launch(4, "zero2"), Launch(8, "ddp")),
    (Launch(2, "zero3", offload=True), Launch(2, "zero1")),
    (Launch(4, "fsdp2"), Launch(2, "zero2", offload=True)),
]


def assert_goes_on(run: Path, straight: Path) -> None:
    """All steps once, most of them by the other launch, with the same losses; and the same weights
    and moments by name, but for what moves where rounding decides at zero."""
    assert [line["step"] for line in metrics_of(run)] == list(range(1, STEPS + 1))
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert sessions[1]["resumed_from_step"] == HANDED_OVER_AT
    assert_same(run, straight, loss=1e-5, steps=AFTER)
    mine, theirs = (
        load_checkpoint(r / "checkpoints" / f"step-{STEPS}")[0] for r in (run, straight)
    )
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        scale = torch.linalg.vector_norm(theirs[name].double())
        assert torch.linalg.vector_norm((tensor - theirs[name]).double()) <= 0.05 * scale, name


@pytest.mark.parametrize(("first", "then"), RING, ids=str)
def test_one_launch_hands_over_to_another(
    first: Launch, then: Launch, golden: Path, made: Made, launcher: Launcher, tmp_path: Path
) -> None:
    out = cut(made(first), tmp_path / "run", after=HANDED_OVER_AT)
    # Of the first's micro-batches, so that the statistics are of as many clips.
    settings = golden_overrides(golden, out, *then.settings, f"train.accumulate={first.accumulate}")
    launcher.program(then.world, [TRAINED, "--resume", "auto", *settings]).well()
    assert_goes_on(out, made(first))


def test_one_process_takes_over_from_four(golden: Path, made: Made, tmp_path: Path) -> None:
    launch = Launch(4, "zero2")
    out = cut(made(launch), tmp_path / "run", after=HANDED_OVER_AT)
    train(golden_config(golden, out), resume="auto")
    assert_goes_on(out, made(launch))
