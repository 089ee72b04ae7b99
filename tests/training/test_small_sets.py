"""A small set trains by the defaults, with the largest batch that it can fill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden_run import golden_store
from helpers import overrides

from dist_train.config import load_config
from dist_train.errors import PlanError
from dist_train.run.data import RunData, open_data
from dist_train.training.small_sets import with_batch_that_fits


def fitted(store: Path, *more: str, world: int = 1) -> RunData:
    settings = [s for s in overrides(store, Path("run")) if not s.startswith("plan.batch")]
    backend: Any = SimpleNamespace(world=world, is_main=True)
    return with_batch_that_fits(open_data(load_config(None, [*settings, *more])), backend)


@pytest.mark.parametrize(
    ("world", "more", "batch"),
    # 28 negatives fill batches of up to 15 of them.
    [
        (1, (), 20),
        (2, (), 16),
        (4, (), 16),
        (1, ("train.accumulate=5",), 20),
        # 32 is no multiple of 3, and 12 positives fill no batch of 7 to 9 of them.
        (1, ("plan.ratio={positive: 1, negative: 2}",), 18),
        # 40 clips fill a batch of 24, which is 3 a process, and clips are mixed in pairs.
        (8, ("plan.ratio=natural",), 24),
        (8, ("plan.ratio=natural", "augment.mixup=0.5"), 16),
    ],
)
def test_the_largest_batch_that_can_be_filled_and_cut_is_taken_and_told(
    store: Path, caplog: pytest.LogCaptureFixture, world: int, more: tuple[str, ...], batch: int
) -> None:
    data = fitted(store, *more, world=world)
    assert data.config.plan.batch == batch
    data.plan().check_cut(world, data.config.train.accumulate)
    (told,) = caplog.messages
    assert told.startswith(f"plan.batch is {batch} rather than 32: ")


def test_a_batch_that_was_given_is_not_changed(store: Path) -> None:
    with pytest.raises(PlanError, match=r"Lower plan\.batch"):
        fitted(store, "plan.batch=32").plan()


def test_a_default_that_fits_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fitted(golden_store(tmp_path)).config.plan.batch == 32
    assert not caplog.messages


def test_where_no_batch_fits_the_reason_is_told(store: Path) -> None:
    with pytest.raises(PlanError, match="the train split has 28 negatives"):
        fitted(store, world=64)
