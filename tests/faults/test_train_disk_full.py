"""The disk fills up while a run trains: it goes on, or ends and can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Runs
from helpers import overrides
from launcher import Launcher
from run_files import DROPOUT, assert_same, checkpoints_of, sessions_of

from dist_train.config import last_of_each


@pytest.fixture(scope="module")
def disk(
    launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Launcher, Path, Path]]:
    """A launcher that sees a small disk, the folder where it does, and the same folder as it is
    seen from here."""
    folder = tmp_path_factory.mktemp("disk")
    with launcher.within(f"mount -t tmpfs -o size=8m tmpfs {folder}") as (inner, pid):
        yield inner, folder, Path(f"/proc/{pid}/root{folder}")


def filled(run: Path, step: int) -> Runs:
    """To the last byte."""
    return Runs(0, step, f"full{step}", command=f"cat /dev/zero > {run}/filler 2> /dev/null; true")


def emptied(run: Path, step: int) -> Runs:
    return Runs(0, step, f"empty{step}", command=f"rm {run}/filler")


def test_a_run_goes_on_over_a_checkpoint_that_cannot_be_written(
    disk: tuple[Launcher, Path, Path], store: Path, straight: Path
) -> None:
    """Full from step 5 to 11: checkpoint 8 fails. In the end nothing is missing but curves."""
    launcher, folder, seen = disk
    out = folder / "on"
    faults = [filled(out, 5), emptied(out, 11)]
    group = launcher.run(2, overrides(store, out, DROPOUT), faults=faults)
    group.well()
    assert "No space left on device" in group.said(0)
    assert "Training goes on" in group.said(0)
    assert "this is number 1" in group.said(0)
    assert group.said(0).count("TensorBoard gets nothing more") == 1
    assert "Traceback" not in group.said()
    assert_same(seen / "on", straight, tensorboard=False)
    assert checkpoints_of(seen / "on") == [16, 18]


def test_after_too_many_failures_it_ends_and_goes_on_when_there_is_room(
    disk: tuple[Launcher, Path, Path], store: Path, straight: Path
) -> None:
    launcher, folder, seen = disk
    out = folder / "ends"
    settings = overrides(store, out, DROPOUT, "checkpoint.max_failures=1")
    group = launcher.run(
        2,
        last_of_each([*settings, "checkpoint.every_steps=2", "train.epochs=3"]),
        faults=[filled(out, 5)],
    )
    assert group.codes() == [1, 1], group.said()
    assert "this is number 1" in group.said(0)
    (message,) = [line for line in group.said(0).splitlines() if line.startswith("error")]
    assert "No space left on device" in message
    assert "Traceback" not in group.said()
    assert checkpoints_of(seen / "ends") == [2, 4]
    (seen / "ends" / "filler").unlink()
    launcher.run(2, settings, resume=True).well()
    assert_same(seen / "ends", straight)
    assert [step for _, step in sessions_of(seen / "ends")] == [None, 4]
