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
from run_files import assert_same, sessions_of

#: How often each kind of fault strikes, of ten faults and of thirty.
KINDS: tuple[tuple[type[Fault], dict[str, Any], int, int], ...] = (
    (Signal, {"number": signal.SIGKILL}, 3, 11),
    (Signal, {"number": signal.SIGTERM}, 0, 2),
    (Signal, {"number": signal.SIGTERM, "to_launcher": True}, 1, 2),
    (Signal, {"number": signal.SIGINT}, 1, 2),
    (Signal, {"number": signal.SIGSTOP}, 0, 1),
    (NotANumber, {}, 2, 5),
    (Torn, {}, 1, 3),
    (Hang, {}, 1, 1),
    (Hang, {"lock": True}, 0, 1),
    (ClockJump, {"hours": 7.0}, 1, 1),
    (ClockJump, {"hours": -9.0}, 0, 1),
)
TEN, THIRTY = 2, 3


def random_faults(column: int, steps: int, seed: int) -> list[Fault]:
    """Each kind has its share, and each fault its random rank and step."""
    rng = random.Random(seed)
    kinds = [(row[0], row[1]) for row in KINDS for _ in range(row[column])]
    faults = []
    for number, (kind, settings) in enumerate(kinds):
        # A checkpoint can be torn, and the run still go on, when there are two.
        step = rng.randrange(16 if kind is Torn else 1, steps)
        faults.append(kind(rng.randrange(2), step, f"{number}", **settings))
    return faults


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("column", "epochs"),
    [(TEN, 7), pytest.param(THIRTY, 16, marks=pytest.mark.soak)],
    ids=["ten", "thirty"],
)
def test_random_faults(
    launcher: Launcher, store: Path, tmp_path: Path, column: int, epochs: int
) -> None:
    straight, out, struck = (tmp_path / name for name in ("straight", "run", "struck"))
    steps = STEPS_PER_EPOCH * epochs
    longer = ("model.dropout=0.3", f"train.epochs={epochs}", f"snapshots.at=[{epochs}]")
    launcher.run(2, overrides(store, straight, *longer)).well()
    faults = random_faults(column, steps, seed=4)
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
