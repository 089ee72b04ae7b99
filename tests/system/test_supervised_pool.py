"""Work in processes that crash, hang, or take too much memory."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from dist_train.errors import DecodeError, StoreError
from dist_train.system.supervised_pool import UNWATCHED, Limits, Steps, each_done, supervised

LIMITS = Limits(seconds=30, bytes=256 << 20)


@dataclass(frozen=True)
class Row:
    """An item: the behaviour of each step, or the reason why the step is left out."""

    words: tuple[str, ...]
    out: tuple[tuple[int, str], ...] = ()
    log: Path | None = None


def leave_out(row: Row, step: int, reason: str) -> Row:
    return replace(row, out=(*row.out, (step, reason)))


def act(row: Row, steps: Steps) -> tuple[str, ...]:
    left_out, told = dict(row.out), []
    for step, word in enumerate(row.words):
        if step in left_out:
            told.append(left_out[step])
            continue
        with steps.at(step):
            if row.log is not None:
                with row.log.open("a") as log:
                    log.write(f"{word}\n")
            told.append(happen(word, row))
    return tuple(told)


def happen(word: str, row: Row) -> str:
    if word == "segfault":
        ctypes.string_at(0)
    elif word == "abort":
        os.abort()
    elif word == "exit":
        os._exit(3)
    elif word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "crash once" and row.log is not None and row.log.read_text().count(word) == 1:
        os.abort()
    elif word == "hang":
        while True:
            time.sleep(60)
    elif word == "greedy":
        try:
            np.ones(1 << 30, np.uint8)
        except MemoryError:
            return "no memory"
    elif word == "refuse":
        raise DecodeError("is no clip", where="here")
    return word


def run(*rows: Row, workers: int = 2, limits: Limits = LIMITS) -> list[tuple[str, ...]]:
    return sorted(supervised(act, rows, leave_out, limits, workers))


def test_all_items_are_done_once() -> None:
    rows = [Row((f"{n}", "b")) for n in range(50)]
    assert run(*rows) == sorted((f"{n}", "b") for n in range(50))
    assert run() == []


@pytest.mark.parametrize(
    ("word", "how"), [("segfault", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "exit code 3")]
)
def test_a_crash_costs_its_step_alone(tmp_path: Path, word: str, how: str) -> None:
    log = tmp_path / "log"
    reason = f"crashes the decoder ({how})"
    told = run(Row(("a", word, "b"), log=log), Row(("c", "d")), Row((word,) * 3))
    assert told == [("a", reason, "b"), ("c", "d"), (reason,) * 3]
    # Tried twice: a cause that passes must not cost a clip.
    assert log.read_text().split() == ["a", word, "a", word, "a", "b"]


def test_a_crash_that_passes_costs_nothing(tmp_path: Path) -> None:
    assert run(Row(("a", "crash once", "b"), log=tmp_path / "log")) == [("a", "crash once", "b")]


def test_a_step_that_hangs_is_ended() -> None:
    quick = replace(LIMITS, seconds=0.5)
    told = run(Row(("a", "hang", "b")), Row(("hang",)), Row(("c",)), limits=quick)
    late = "takes longer than 0.5 s to decode"
    assert told == [("a", late, "b"), ("c",), (late,)]


def test_memory_beyond_the_limit_is_refused() -> None:
    assert run(Row(("greedy", "a"))) == [("no memory", "a")]


def test_a_kill_from_outside_is_no_fault_of_the_file() -> None:
    with pytest.raises(StoreError, match=r"a worker process died \(SIGKILL\)"):
        run(Row(("a", "killed")))


def test_an_error_comes_as_it_was_raised_and_ends_all() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(DecodeError, match="here: is no clip") as caught:
        run(Row(("a", "refuse")), Row(("hang",)))
    assert "in happen" in "".join(caught.value.__notes__)
    # The fork server stays.
    after = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert len([pid for pid in after if "resource_tracker" not in cmdline(pid)]) <= 1


def cmdline(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


def test_items_are_taken_as_they_are_needed() -> None:
    taken = 0

    def rows():
        nonlocal taken
        for n in range(20):
            taken += 1
            yield Row((f"{n}",))

    results = supervised(act, rows(), leave_out, LIMITS, 2)
    next(results)
    assert taken <= 4
    assert len(list(results)) == 19


def test_without_a_parent() -> None:
    assert act(Row(("a", "b")), UNWATCHED) == ("a", "b")


@pytest.mark.parametrize(("items", "alone"), [(5, False), (1, True)])
def test_a_function_without_steps(items: int, alone: bool) -> None:
    found = list(each_done(where_and_twice, range(items), 2))
    assert sorted(value for _, value in found) == [2 * n for n in range(items)]
    assert ({process for process, _ in found} == {os.getpid()}) == alone


def where_and_twice(item: int) -> tuple[int, int]:
    return os.getpid(), 2 * item


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(StoreError, match=r"a worker process died \(SIGKILL\)"):
        list(each_done(end_at_three, range(5), 2))


def end_at_three(item: int) -> None:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
