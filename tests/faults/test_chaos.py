"""Thirty random faults over one run: in the end, the run that nobody disturbed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from faults import ClockJump, Fault, Hang, NotANumber, Signal, Torn
from helpers import overrides
from launcher import Launcher
from run_files import assert_same, sessions_of

EPOCHS, FAULTS = 16, 30
STEPS = 6 * EPOCHS


def random_faults(seed: int) -> list[Fault]:
    """Each kind has its share, and each fault its random rank and step."""
    rng = random.Random(seed)
    kinds = [
        *[(Signal, {"number": signal.SIGKILL})] * 11,
        *[(Signal, {"number": signal.SIGTERM})] * 2,
        *[(Signal, {"number": signal.SIGTERM, "to_launcher": True})] * 2,
        *[(Signal, {"number": signal.SIGINT})] * 2,
        (Signal, {"number": signal.SIGSTOP}),
        *[(NotANumber, {})] * 5,
        *[(Torn, {})] * 3,
        (Hang, {}),
        (Hang, {"lock": True}),
        *[(ClockJump, {"hours": rng.uniform(-9, 9)}) for _ in range(2)],
    ]
    assert len(kinds) == FAULTS
    faults = []
    for number, (kind, settings) in enumerate(kinds):
        # A checkpoint can be torn, and the run still go on, when there are two.
        step = rng.randrange(16 if kind is Torn else 1, STEPS)
        faults.append(kind(rng.randrange(2), step, f"{number}", **settings))
    return faults


@pytest.mark.timeout(900)
def test_thirty_faults(launcher: Launcher, store: Path, tmp_path: Path) -> None:
    straight, out, struck = (tmp_path / name for name in ("straight", "run", "struck"))
    longer = ("model.dropout=0.3", f"train.epochs={EPOCHS}", f"snapshots.at=[{EPOCHS}]")
    launcher.run(2, overrides(store, straight, *longer)).well()
    faults = random_faults(seed=4)
    settings = overrides(store, out, *longer, "checkpoint.keep_last=4", "train.hang=3")
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
    assert launchers == 3
    assert len(sessions_of(out)) > 15
    assert_same(out, straight, STEPS)
