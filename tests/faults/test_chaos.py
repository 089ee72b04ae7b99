"""Random faults over one run: in the end, the run that nobody disturbed."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from faults import ClockJump, Fault, Hang, NotANumber, Signal, Torn
from helpers import STEPS_PER_EPOCH, overrides
from launcher import Launcher
from run_files import DROPOUT, assert_same, sessions_of

Kinds = list[tuple[type[Fault], dict[str, Any]]]
KINDS: Kinds = [
    *([(Signal, {"number": signal.SIGKILL})] * 3),
    (Signal, {"number": signal.SIGTERM, "to_launcher": True}),
    (Signal, {"number": signal.SIGINT}),
    *([(NotANumber, {})] * 2),
    (Torn, {}),
    (Hang, {}),
    (ClockJump, {"hours": 7.0}),
]
ONE_OF_EACH = [KINDS[0], *KINDS[3:6], *KINDS[7:]]


def random_faults(seed: int, kinds: Kinds, steps: int) -> list[Fault]:
    """One of each entry of ``kinds``, at a random rank and step."""
    rng = random.Random(seed)
    faults = []
    for number, (kind, settings) in enumerate(kinds):
        # The run survives a torn checkpoint only when there are two.
        step = rng.randrange(16 if kind is Torn else 1, steps)
        faults.append(kind(rng.randrange(2), step, f"{number}", **settings))
    return faults


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kinds", "epochs", "seed"),
    # Of this seed no two of them strike at one step.
    [(ONE_OF_EACH, 4, 16), pytest.param(KINDS, 7, 4, marks=pytest.mark.soak)],
    ids=["one of each", "all"],
)
def test_random_faults(
    launcher: Launcher, store: Path, tmp_path: Path, kinds: Kinds, epochs: int, seed: int
) -> None:
    straight, out, struck = (tmp_path / name for name in ("straight", "run", "struck"))
    steps = STEPS_PER_EPOCH * epochs
    longer = (DROPOUT, f"train.epochs={epochs}", f"snapshots.at=[{epochs}]")
    launcher.run(2, overrides(store, straight, *longer)).well()
    faults = random_faults(seed, kinds, steps)
    settings = overrides(store, out, *longer, "checkpoint.keep_last=4", "train.hang_timeout=3")
    launchers = 0
    while True:
        group = launcher.elastic(settings, faults=faults, struck=struck, restarts=40, grace=4)
        (code,) = group.codes(600)
        launchers += 1
        if code == 0:
            break
        assert code == 75, group.said()
    strikes = {path.stem for path in struck.iterdir() if path.name != "faults.json"}
    assert strikes == {fault.name for fault in faults}
    to_launchers = sum(getattr(fault, "to_launcher", False) for fault in faults)
    assert launchers == 1 + to_launchers
    assert len(sessions_of(out)) > len(faults) // 2
    assert_same(out, straight, steps)
