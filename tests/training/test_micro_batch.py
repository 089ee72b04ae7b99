"""Memory that does not suffice: the probe, a repeated step, and the budget of activations.

A CPU has no such limit, so a hook on the real model raises the errors of CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config
from plans import make_plan
from short_runs import assert_same_run, train_until
from torch import nn

from dist_train.class_ratio import ClassRatio
from dist_train.config import AugmentSettings, Config, load_config
from dist_train.data.augment.mix import whole_group
from dist_train.data.plan.depth_order import by_depth
from dist_train.data.plan.plan import Plan
from dist_train.data.plan.plan import plan_of as natural
from dist_train.data.plan.rules import PlanRules
from dist_train.errors import PlanError, RunError
from dist_train.models.activation_budget import measure_parts, weigh
from dist_train.models.registry import build_model
from dist_train.run.data import open_data
from dist_train.run.folder import MICRO_BATCH
from dist_train.run.model import make_model
from dist_train.run.record import read_record
from dist_train.training import micro_batch
from dist_train.training.micro_batch import MicroBatches, largest_step, most_clips, next_cut
from dist_train.training.train import train
from dist_train.training.trainer import BeforeStep, Trainer

# 4 groups of 1:3 a step, 3 steps an epoch, and a checkpoint after each 4th.
SETTINGS = ("plan.batch=16", "model.dropout=0.3", "snapshots.at=[3]")


def config_of(store: Path, out: Path, *more: str) -> Config:
    return tiny_config(store, out, *SETTINGS, *more)


def accumulated(run: Path) -> list[int]:
    """Micro-batches per step, of each session."""
    return [session["micro_batch"]["accumulate"] for session in read_record(run)["sessions"]]


NO_MEMORY = torch.OutOfMemoryError("Tried to allocate 9 GiB.\nMore is told here.")
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


def limit(
    model: nn.Module, clips: int, *, spared: int = 0, error: RuntimeError = NO_MEMORY
) -> None:
    """Let the model fail in training on over ``clips`` clips, after ``spared`` such batches."""
    left = [spared]

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(inputs[0]) > clips:
            left[0] -= 1
            if left[0] < 0:
                raise error

    model.register_forward_pre_hook(check)


def limit_at(step: int, clips: int, **more: Any) -> BeforeStep:
    """Call ``limit`` before a step, once."""
    limited = []

    def before_step(trainer: Trainer, coming: int) -> None:
        if coming == step and not limited:
            limited.append(coming)
            limit(trainer.backend.module, clips, **more)

    return before_step


@pytest.fixture(scope="module")
def cut(store: Path) -> Callable[[int], Path]:
    """A run with a number of micro-batches per step; not to be changed."""

    @cache
    def trained(accumulate: int) -> Path:
        out = store.parent / f"cut-{accumulate}"
        train(config_of(store, out, f"train.accumulate={accumulate}"))
        return out

    return trained


# How a step is cut.


def plan_of(batch: int, **more: Any) -> Plan:
    return make_plan(np.arange(100), np.arange(100, 900), batch=batch, ratio=(1, 3), seed=0, **more)


@pytest.mark.parametrize(
    ("batch", "world", "expected"),
    [
        (64, 1, [1, 2, 4, 8, 16]),
        (64, 4, [1, 2, 4]),
        (48, 1, [1, 2, 4, 12]),
        (48, 4, [1, 3]),
        (20, 1, [1, 5]),
    ],
)
def test_cuts_halve_as_long_as_groups_stay_whole(
    batch: int, world: int, expected: list[int]
) -> None:
    plan, found = plan_of(batch), [1]
    while (more := next_cut(plan, world, found[-1])) is not None:
        plan.check_cut(world, more)
        found.append(more)
    assert found == expected


def test_clips_that_are_mixed_stay_in_pairs() -> None:
    """Halves of 12 single clips are 6 and 3; pairs are not cut."""
    rules = PlanRules(12, ClassRatio((1,)), 0, "matched", None, 1)
    plan = natural(by_depth(np.arange(100), None, name="clips"), [], rules)
    found = [1]
    group = whole_group(AugmentSettings(cutmix=0.1), 1)
    while (more := next_cut(plan, 1, found[-1], group)) is not None:
        plan.check_cut(1, more, group)
        found.append(more)
    assert found == [1, 2, 6]
    assert next_cut(plan, 1, 2) == 4
    with pytest.raises(PlanError, match="with 2 clips that are mixed with each other in each"):
        plan.check_cut(1, 4, group)
    assert [whole_group(AugmentSettings(mixup=0.1), clips) for clips in (2, 3)] == [2, 3]
    assert whole_group(AugmentSettings(), 1) == 1


def test_no_step_takes_more_than_the_largest() -> None:
    assert largest_step(plan_of(16), 70) == (16, 70)
    depths = np.random.default_rng(0).integers(4, 60, 900)
    for budget in (16 * 60 * 25, 16 * 90 * 25, 16 * 500 * 25):
        plan = plan_of(
            16,
            positive_depths=depths[:100],
            negative_depths=depths[100:],
            max_voxels=budget,
            frame_voxels=25,
        )
        clips, frames = largest_step(plan, int(depths.max()))
        taken = [
            plan.clips_at(step) * int(plan.depths(step).max()) for step in range(plan.first_step(3))
        ]
        assert max(taken) <= clips * frames
        assert clips * frames <= max(budget / 25, 16 * depths.max())
        assert max(taken) > 0.6 * clips * frames


# A step that is repeated.


@pytest.fixture(scope="module")
def repeated(store: Path) -> Path:
    """A run whose 5th step has memory for its first micro-batch only; not to be changed."""
    out = store.parent / "repeated"
    train(
        config_of(store, out, "train.accumulate=2"),
        before_step=limit_at(4, clips=4, spared=1),
    )
    return out


def test_the_step_is_repeated_as_if_it_had_always_been_cut_so(
    store: Path, repeated: Path, tmp_path: Path
) -> None:
    """To the bit: no statistics, random numbers or predictions of the failed attempt are left."""
    first = config_of(store, tmp_path, "train.accumulate=2")
    train_until(first, 4)
    train(config_of(store, tmp_path, "train.accumulate=4"), resume="auto")
    assert_same_run(repeated, tmp_path)


def test_a_resumed_run_keeps_what_was_found(store: Path, repeated: Path, tmp_path: Path) -> None:
    config = config_of(store, tmp_path, "train.accumulate=2")
    train_until(config, 6, before_step=limit_at(4, clips=4, spared=1))
    train(config, resume="auto")
    assert_same_run(tmp_path, repeated)
    assert accumulated(tmp_path) == [2, 4]
    assert load_config(tmp_path / "config.yaml").train.accumulate == 2


@pytest.mark.parametrize(
    ("more", "note", "accumulate"),
    [
        ((), None, 4),
        (("model.recompute=block",), None, 1),
        (("clip.max_frames=4",), None, 1),
        ((), '{"clips": ', 1),
    ],
    ids=["the same settings", "another model", "other clips", "a damaged note"],
)
def test_a_note_counts_for_the_settings_that_it_was_found_with(
    store: Path,
    repeated: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    more: tuple[str, ...],
    note: str | None,
    accumulate: int,
) -> None:
    (tmp_path / MICRO_BATCH).write_text(note or (repeated / MICRO_BATCH).read_text())
    train_until(config_of(store, tmp_path, *more), 1)
    assert accumulated(tmp_path) == [accumulate]
    assert (f"{tmp_path / MICRO_BATCH} is ignored" in caplog.text) is (note is not None)


def test_one_group_cannot_be_halved(store: Path, tmp_path: Path) -> None:
    config = config_of(store, tmp_path, "train.accumulate=4")
    with pytest.raises(RunError) as caught:
        train(config, before_step=limit_at(0, clips=1))
    assert "a micro-batch of 1 positives to 3 negatives of up to 8 frames" in str(caught.value)
    assert "Set model.recompute or model.activation_memory, or lower clip.max_" in str(caught.value)


def test_an_engine_that_is_missing_at_any_size_is_told_and_not_noted(
    store: Path, tmp_path: Path
) -> None:
    noted = []

    def before_step(trainer: Trainer, coming: int) -> None:
        if coming == 2 and trainer.micro.accumulate == 1:
            limit(trainer.backend.module, clips=1, error=NO_ENGINE)
        noted.append((tmp_path / MICRO_BATCH).exists())

    with pytest.raises(RunError) as caught:
        train(config_of(store, tmp_path), before_step=before_step)
    text = str(caught.value)
    assert str(NO_ENGINE) in text
    assert "cuDNN has no kernel for this: install another torch" in text
    assert noted == [False, False, False, True, True]
    assert not (tmp_path / MICRO_BATCH).exists()


# Tensors that CUDA's kernels can index.


def test_clips_of_a_batch_follow_from_the_largest_tensor_of_the_model() -> None:
    """It is the stem's output, 64 channels of 60 x 80 x 80; without a pool, layer 1's output."""
    settings = ["store=s", "clip.size=[160, 160]", "model.name=resnet3d-50"]
    for more, elements in [
        ([], 64 * 60 * 80 * 80),
        (["model.stem_folded=true", "model.width=32"], 32 * 60 * 80 * 80),
        (["model.stem_pool=false"], 256 * 60 * 80 * 80),
    ]:
        config = load_config(None, [*settings, *more])
        assert most_clips(config.model, (60, *config.clip.size)) == (2**31 - 2) // elements
    large = load_config(None, ["store=s", "clip.size=[9000, 9000]", "model.name=resnet3d-50"])
    assert most_clips(large.model, (60, *large.clip.size)) == 1


@pytest.mark.parametrize("name", ["clog_loss_ddp", "clog_loss_zero2"])
def test_the_shipped_gpu_configs_give_a_card_32_clips(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert (config.model.recompute, config.model.activation_memory) == ("none", None)
    assert config.model.stem_folded
    assert config.optim.fused
    assert config.train.probe == "cuda"
    assert config.clip.max_frames is not None
    shape = (config.clip.max_frames, *config.clip.size)
    assert 32 <= most_clips(config.model, shape) < 64
    for cards in (1, 2, 4, 8):
        plan_of(config.plan.batch).check_cut(cards, config.train.accumulate)
    plan_of(128).check_cut(8, config.train.accumulate)


@pytest.mark.slow
def test_the_activations_of_32_clips_of_the_shipped_gpu_configs_fit_into_80_gb() -> None:
    config = load_config(ROOT / "configs" / "clog_loss_ddp.yaml")
    shape = (32, 1, config.clip.max_frames or 0, *config.clip.size)
    make = partial(build_model, config.model.name, stem_folded=True)
    taken = weigh(("none",) * 5, measure_parts(make, shape, torch.bfloat16)).bytes
    assert 47 * 2**30 < taken < 50 * 2**30


@pytest.mark.parametrize(
    ("device", "world", "accumulate", "clips"),
    [("cuda", 1, 4, 16), ("cuda", 2, 2, 8), ("cuda", 4, 1, None), ("cpu", 1, 1, None)],
)
def test_on_cuda_steps_are_cut_until_32_bits_index_their_tensors(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    world: int,
    accumulate: int,
    clips: int | None,
) -> None:
    """``clips`` of the uncut micro-batch, if it is cut."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some card")
    # Layer 1's output, 4 channels of 8 x 8 x 8, of 4 clips and not of 8.
    monkeypatch.setattr(micro_batch, "INDEXED_BY_32_BITS", 5 * 4 * 8 * 8 * 8)
    config = config_of(store, tmp_path, "train.probe=never")
    backend: Any = SimpleNamespace(
        rank=0, world=world, is_main=True, device=torch.device(device), gather=lambda value: [value]
    )
    data = open_data(config)
    assert MicroBatches(config, data, data.plan(), backend).accumulate == accumulate
    if clips is None:
        assert not caplog.messages
        return
    (told,) = caplog.messages
    assert told.startswith(f"a tensor of {clips} clips of 8 frames has 2^31 elements or more")
    assert told.endswith(f"train.accumulate is {accumulate} here, and a micro-batch has 4 clips")


# The probe.


@pytest.mark.parametrize(("memory_for", "accumulate"), [(16, 1), (15, 2), (5, 4)])
def test_the_probe_finds_the_micro_batch_before_the_first_step(
    store: Path,
    cut: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory_for: int,
    accumulate: int,
) -> None:
    """It leaves no trace: the run is, to the bit, one with that ``train.accumulate``."""
    expected = cut(accumulate)

    def limited(config: Config) -> nn.Module:
        model = make_model(config)
        limit(model, memory_for)
        return model

    monkeypatch.setattr(micro_batch, "make_model", limited)
    config = config_of(store, tmp_path / "found", "train.probe=always")
    train_until(config, 5)
    train(config, resume="auto")
    assert_same_run(config.out, expected)
    assert accumulated(config.out) == [accumulate] * 2


# The budget of activations.


def test_a_budget_changes_nothing_but_memory(
    store: Path, cut: Callable[[int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = cut(1)
    with caplog.at_level(logging.INFO, "dist_train"):
        train(config_of(store, tmp_path / "budget", "model.activation_memory=1200KiB"))
    assert_same_run(tmp_path / "budget", plain)
    metadata = read_record(tmp_path / "budget")["sessions"][0]["micro_batch"]
    assert list(metadata["recompute"]) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert set(metadata["recompute"].values()) != {"none"}
    assert metadata["activation_bytes"] <= 1200 * 2**10
    assert ", ".join(metadata["recompute"].values()) in caplog.text


def test_a_budget_that_nothing_fits_says_what_would(store: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        train(config_of(store, tmp_path / "run", "model.activation_memory=10KiB"))
    text = str(caught.value)
    assert text.startswith("model.activation_memory: activations of 16 clips of 8 frames take ")
    assert " MiB at the least, and the budget is 0.0 MiB. Give so much, raise" in text
    assert not (tmp_path / "run").exists()
