"""Trainings that end early, and runs that must be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import InterruptedSessionError, contents, interrupt_at, metrics_of

from dist_train.config import Config
from dist_train.training.train import train


def train_until(config: Config, step: int, **more: Any) -> None:
    """Train, and end the session after ``step`` steps."""
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(step), **more)


def assert_same_run(run: Path, other: Path) -> None:
    """Compare the metrics and the snapshots of two runs, bit for bit."""
    assert metrics_of(run) == metrics_of(other)
    assert contents(run / "snapshots") == contents(other / "snapshots")
