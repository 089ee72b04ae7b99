"""A store, and a run that nobody disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import overrides
from launcher import Launcher
from run_files import DROPOUT


@pytest.fixture(scope="session")
def straight(launcher: Launcher, store: Path) -> Path:
    """18 steps on 2 ranks, with a checkpoint after each 4th; not to be changed."""
    out = store.parent / "faults"
    launcher.run(2, overrides(store, out, DROPOUT)).well()
    return out
