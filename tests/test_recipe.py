"""The shipped configs of the challenge are as long as the original recipe, and phase 2 begins with
the weights of phase 1."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from tables import table_of, two_classes

from dist_train.config import Config, load_config
from dist_train.data.plan.plan import Plan, make_plan
from dist_train.data.splits import CODES, choose_clips
from dist_train.training.schedule import Schedule

#: Stalled and flowing clips of tier 1; tier-2 clips that are stalled with a crowd score above 0.6.
TIER1_STALLED, TIER1_FLOWING, TIER2_STALLED = 706, 539_536, 854


@cache
def clips() -> pd.DataFrame:
    """The challenge's training clips by class, tier and score, as its tables have them."""
    parts = pd.DataFrame(
        {
            "label": [1, 0, 1, 1, 0],
            "tier1": [True, True, False, False, False],
            "crowd_score": [0.9, 0.1, 0.7, 0.6, 0.1],
            "group": "",
            "split": "",
        }
    )
    counts = [TIER1_STALLED, TIER1_FLOWING, TIER2_STALLED, 100, 31_852]
    table = parts.loc[parts.index.repeat(counts)].reset_index(drop=True)
    return table.assign(key=table.index.astype(str))


def config_of(name: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml")


@cache
def plan_of(name: str) -> Plan:
    config = config_of(name)
    table = table_of(clips())
    settings = config.select, config.split, config.seed
    train = choose_clips(table, *settings, labels=two_classes(table)) == CODES["train"]
    return make_plan(
        np.flatnonzero(train & (table["label"] == 1)),
        np.flatnonzero(train & (table["label"] == 0)),
        batch=config.plan.batch,
        ratio=config.plan.ratio,
        seed=config.seed,
    )


@pytest.mark.parametrize(
    ("name", "positives", "epochs"),
    [("clog_loss_seed", 706, 915), ("clog_loss_seed_phase2", 1560, 1115)],
)
def test_both_phases_have_the_visits_that_were_counted(
    name: str, positives: int, epochs: int
) -> None:
    config = config_of(name)
    plan = plan_of(name)
    assert (len(plan.anchor), len(plan.others[0].clips)) == (positives, TIER1_FLOWING)
    assert config.plan.batch * plan.first_step(config.train.epochs) == 4 * positives * epochs


def test_the_rate_is_least_at_the_snapshots_but_one() -> None:
    for name, at in (("clog_loss_seed", (515, 705, 915)), ("clog_loss_seed_phase2", (1115,))):
        config = config_of(name)
        plan = plan_of(name)
        steps = plan.first_step(config.train.epochs)
        schedule = Schedule(config.schedule, config.optim.lr, steps, config.train.epochs)
        for epoch in at:
            assert epoch in config.snapshots.at
            last = plan.first_step(epoch) - 1
            assert schedule.lr(last) == pytest.approx(0.01 * config.optim.lr, rel=1e-3)
            # Down in 5 epochs, and up in 5.
            assert schedule.lr(plan.first_step(epoch - 5)) == pytest.approx(config.optim.lr)


def test_phase_2_is_phase_1_but_for_what_is_named() -> None:
    first, second = config_of("clog_loss_seed"), config_of("clog_loss_seed_phase2")
    step = plan_of("clog_loss_seed").first_step(515)
    assert str(second.model.init) == f"{first.out}/snapshots/step-{step}.safetensors"
    for section in ("split", "clip", "augment", "plan", "optim", "schedule", "norm"):
        assert getattr(first, section) == getattr(second, section)
    assert first.model == second.model.model_copy(update={"init": None})
    assert (first.optim.decay, first.optim.weight_decay, first.optim.clip_norm) == (
        "all", 5e-4, None
    )  # fmt: skip
    assert first.augment.preset == "original"
    # Batches of 4: the running statistics are of more clips than fresh ones would be.
    assert first.norm.precise_steps == 0


@pytest.mark.slow
def test_the_gpu_configs_are_as_long() -> None:
    """Half a million keys are hashed for the split."""
    name, config = "clog_loss_ddp", config_of("clog_loss_ddp")
    other = config_of("clog_loss_zero2")
    for section in ("split", "select", "clip", "plan", "optim", "schedule", "snapshots"):
        assert getattr(config, section) == getattr(other, section)
    assert config.train == other.train.model_copy(update={"backend": "ddp"})
    visits = config.plan.batch * plan_of(name).first_step(config.train.epochs)
    assert math.isclose(visits, 4 * 706 * 915 + 4 * 1560 * 1115, rel_tol=2e-3)
