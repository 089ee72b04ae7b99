"""Training on clips that grow, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import InterruptedSessionError, interrupt_at, metrics_of, tiny_config
from torch import nn

from dist_train.config import ClipSettings, Config
from dist_train.errors import ConfigError
from dist_train.run.data import open_data
from dist_train.training.train import train
from dist_train.training.trainer import Trainer

STEPS_PER_EPOCH = 6
GROWTH = (
    "clip.max_frames=7",
    "clip.growth=[{epochs: 1, size: [8, 8], max_frames: 4}, {epochs: 1, size: [12, 12]}]",
    "norm.precise_steps=2",
)


def test_what_holds_in_an_epoch() -> None:
    stages = [
        {"epochs": 2, "size": (8, 8), "max_frames": 40},
        {"epochs": 1, "size": (12, 12), "max_frames": 9},
        {"epochs": 1, "size": (14, 14)},
    ]
    clip = ClipSettings.model_validate({"size": (16, 16), "max_frames": 20, "growth": stages})
    assert clip.stage_ends == [2, 3, 4]
    shapes = [(clip.at(epoch).size, clip.at(epoch).max_frames) for epoch in range(6)]
    assert shapes[:2] == [((8, 8), 20)] * 2
    assert shapes[2:4] == [((12, 12), 9), ((14, 14), 20)]
    assert shapes[4:] == [((16, 16), 20)] * 2


def shapes_seen(config: Config) -> list[tuple[int, bool, tuple[int, ...]]]:
    """Train; of every pass the number of steps done, whether in training mode, and D, H, W."""
    seen = []

    def before_step(trainer: Trainer, step: int) -> None:
        def note(module: nn.Module, inputs: Any) -> None:
            seen.append((trainer.done, module.training, tuple(inputs[0].shape[2:])))

        if step == 0:
            trainer.backend.module.register_forward_pre_hook(note)

    train(config, before_step=before_step)
    return seen


@pytest.fixture(scope="module")
def straight(store: Path) -> tuple[Path, list[tuple[int, bool, tuple[int, ...]]]]:
    """A run from its beginning to its end, and what was seen of it; not to be changed."""
    out = store.parent / "growth"
    return out, shapes_seen(tiny_config(store, out, *GROWTH))


@pytest.mark.parametrize("on_device", [False, True])
def test_clips_grow_in_training_and_are_whole_where_they_are_judged(
    store: Path, tmp_path: Path, request: pytest.FixtureRequest, on_device: bool
) -> None:
    if on_device:
        seen = shapes_seen(tiny_config(store, tmp_path / "run", *GROWTH, "augment.device=true"))
    else:
        _, seen = request.getfixturevalue("straight")
    shapes = [(4, 8, 8), (7, 12, 12), (7, 16, 16)]
    for done, training, shape in seen:
        epoch, within = divmod(done, STEPS_PER_EPOCH)
        if training and within:
            assert shape == shapes[epoch]
    # The first passes of an epoch are its first step; passes before it judge the epoch that ends.
    starts = [next(s for d, t, s in seen if d == 0 and t)]
    assert starts == [shapes[0]]
    evaluated = {shape for done, training, shape in seen if not training and done}
    # Held-out clips, and the gap of normalisation on the last batch of each epoch.
    assert evaluated == {*shapes}
    assert {shape for d, t, shape in seen if d == 2 * STEPS_PER_EPOCH and t} == {
        shapes[1],  # statistics that epoch 2 is judged by
        shapes[2],  # the step after it
    }
    # Two for the figures and the snapshot together, and one for the step.
    assert sum(d == 2 * STEPS_PER_EPOCH and t for d, t, _ in seen) == 3


def test_a_run_resumed_in_a_stage_equals_the_straight_one(
    store: Path,
    straight: tuple[Path, list[tuple[int, bool, tuple[int, ...]]]],
    tmp_path: Path,
) -> None:
    expected, _ = straight
    resumed = tiny_config(store, tmp_path / "resumed", *GROWTH)
    with pytest.raises(InterruptedSessionError):
        train(resumed, progress=interrupt_at(9))
    train(resumed, resume="auto")
    assert metrics_of(resumed.out) == metrics_of(expected)
    for step in (12, 18):
        name = f"snapshots/step-{step}.safetensors"
        assert (resumed.out / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ("[{epochs: 3, size: [8, 8]}]", "its stages last 3 epochs, and the run has 3"),
        ("[{epochs: 1, size: [8, 12]}]", "quarter turns need square clips"),
    ],
)
def test_growth_that_cannot_be(store: Path, tmp_path: Path, growth: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_data(tiny_config(store, tmp_path / "run", f"clip.growth={growth}"))
