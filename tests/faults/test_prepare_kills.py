"""`prepare` killed again and again: in the end, the store of a run that nobody disturbed."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
from helpers import ROOT, contents, dist_train, environment, run_well
from inotify import CREATED, MOVED_IN, OPENED, Event, Watch

from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS, Store
from dist_train.data.synthetic.render import synthesize

SHARD_CLIPS = 2
#: Of two shards that are being written, about.
EVENTS = 10


class Job:
    """A `prepare` of synthetic clips, and what is known of its files from the kernel."""

    def __init__(self, raw: Path, out: Path) -> None:
        self.raw, self.out = raw, out
        names = pd.read_csv(raw / "train_metadata.csv")["filename"]
        self.shard_of = {name: number // SHARD_CLIPS for number, name in enumerate(names)}
        self.finished: set[int] = set()
        self.decoded: list[str] = []
        self.redone: list[str] = []

    def command(self) -> list[str]:
        return dist_train(
            *("prepare", "--manifest", self.raw / "train_metadata.csv", "--out", self.out),
            *("--source", self.raw / "videos", "--shard-clips", SHARD_CLIPS, "--workers", 2),
        )

    def note(self, event: Event) -> None:
        if event.kind == OPENED and event.name.endswith(".mp4"):
            self.decoded.append(event.name)
            if self.shard_of[event.name] in self.finished:
                self.redone.append(event.name)
        elif event.kind == MOVED_IN and event.name.endswith(".tar"):
            self.finished.add(int(event.name.removesuffix(".tar").removeprefix("shard-")))

    def killed_at(self, reached: Callable[[Event], bool]) -> bool:
        """Run it, and SIGKILL it and all its processes at an event; False if it ended before."""
        (self.out / SHARDS).mkdir(parents=True, exist_ok=True)
        watch = Watch(
            {
                self.raw / "videos": OPENED,
                self.out: CREATED | MOVED_IN | OPENED,
                self.out / SHARDS: CREATED | MOVED_IN,
            }
        )
        process = psutil.Popen(
            self.command(),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            while process.poll() is None:
                for event in watch.events(timeout=0.02):
                    self.note(event)
                    if reached(event):
                        self._kill(process)
                        for late in watch.events(timeout=0):
                            self.note(late)
                        break
            assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()
            return process.returncode != 0
        finally:
            process.stderr.close()
            watch.close()

    @staticmethod
    def _kill(process: psutil.Popen) -> None:
        family = [process]
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
        for member in family:
            # It may have ended since the event.
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)


def after(shards: Callable[[], int], finished: int, events: int) -> Callable[[Event], bool]:
    """True once so many ``shards`` are finished and then so many events have passed."""
    seen = 0

    def reached(_: Event) -> bool:
        nonlocal seen
        seen += shards() >= finished
        return seen > events

    return reached


def named(*starts: str) -> Callable[[Event], bool]:
    return lambda event: event.name.startswith(starts) and event.kind != OPENED


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kills", "shards", "spare"),
    # The last shards are spared, as a signal comes later than the event that it is sent for.
    [(12, 16, 6), pytest.param(40, 40, 12, marks=pytest.mark.soak)],
)
def test_kills(tmp_path: Path, kills: int, shards: int, spare: int) -> None:
    clips = shards * SHARD_CLIPS
    raw = tmp_path / "raw"
    synthesize(raw, clips=clips, seed=5, stall_rate=0.25)
    straight = Job(raw, tmp_path / "straight")
    assert not straight.killed_at(lambda _: False)
    assert sorted(set(straight.decoded)) == sorted(straight.shard_of)

    job = Job(raw, tmp_path / "store")
    rng = random.Random(7)
    # Most fall into the writing of shards, each a little further; some before and some at the end.
    for kill in range(kills - 4):
        finished = kill * (shards - spare) // (kills - 4)
        assert job.killed_at(after(lambda: len(job.finished), finished, rng.randrange(EVENTS)))
    assert len(job.finished) >= (shards - spare) // 2
    assert not (job.out / MARKER).exists()
    for last in (named(REJECTED), named(INDEX), named(INDEX), named(MARKER)):
        # The last steps are short: where it ended before the signal came, they are taken again.
        while not job.killed_at(last):
            (job.out / MARKER).unlink()
    run_well(job.command())

    assert job.redone == []
    assert set(job.decoded) == set(job.shard_of)
    assert contents(job.out) == contents(straight.out)
    assert len(Store(job.out).table) == clips
    assert not list(job.out.rglob("*.partial"))
