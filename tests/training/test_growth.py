"""Training on clips that grow, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import (
    STEPS_PER_EPOCH,
    tiny_config,
)
from short_runs import assert_same_run, train_until
from torch import nn

from dist_train.config import ClipSettings, Config
from dist_train.errors import ConfigError
from dist_train.run.data import open_data
from dist_train.training.train import train
from dist_train.training.trainer import Trainer

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


#: Of each forward pass: steps done, whether in training mode, and D, H, W.
Passes = list[tuple[int, bool, tuple[int, ...]]]


def shapes_seen(config: Config) -> Passes:
    """Train, and return the forward passes."""
    seen = []

    def before_step(trainer: Trainer, step: int) -> None:
        def note(module: nn.Module, inputs: Any) -> None:
            seen.append((trainer.done, module.training, tuple(inputs[0].shape[2:])))

        if step == 0:
            trainer.backend.module.register_forward_pre_hook(note)

    train(config, before_step=before_step)
    return seen


@pytest.fixture(scope="module")
def straight(store: Path) -> tuple[Path, Passes]:
    """A run and its forward passes; not to be changed."""
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
    # Whole held-out clips; and, for the gap of normalisation, the last batch of each epoch.
    assert {shape for done, training, shape in seen if not training and done} == {*shapes}
    # At the end of an epoch: two steps for the statistics of its weights, and the next step.
    turn = [shape for done, training, shape in seen if done == 2 * STEPS_PER_EPOCH and training]
    assert turn == [shapes[1], shapes[1], shapes[2]]


def test_a_run_resumed_in_a_stage_equals_the_straight_one(
    store: Path,
    straight: tuple[Path, Passes],
    tmp_path: Path,
) -> None:
    expected, _ = straight
    resumed = tiny_config(store, tmp_path / "resumed", *GROWTH)
    train_until(resumed, 9)
    train(resumed, resume="auto")
    assert_same_run(resumed.out, expected)


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
