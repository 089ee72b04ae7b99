"""metrics.jsonl and TensorBoard: the same numbers, each step once, also after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import board_of, environment
from room import LittleRoom
from syncs import Sync, record_syncs

from dist_train.training.metrics_log import EventWriter, figures_of


def write(run: Path, steps: range, *, after: int, value: float = 0.0) -> None:
    with EventWriter(run, {}, after=after) as events:
        for step in steps:
            events.write(step, 0, 1000.0 + step, {"a/loss": value + step, "a/gone": None})


def lines_of(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "crc32c"} for line in lines]


def test_numbers_go_to_both_under_the_same_names(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), after=0)
    assert lines_of(tmp_path)[1] == {
        "step": 2, "epoch": 0, "time": 1002.0, "a/loss": 2.0, "a/gone": None
    }  # fmt: skip
    assert board_of(tmp_path, "a/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    with EventWriter(tmp_path, {}, after=0) as events:
        events.write(1, 0, 1.0, {"a": value, "b": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["a"] is None
    assert board_of(tmp_path, "b") == [(1, 2.0)]


def test_what_came_after_the_checkpoint_is_dropped_from_both(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), after=0)
    write(tmp_path, range(5, 10), after=4, value=100)
    values = [1.0, 2, 3, 4, 105, 106, 107, 108, 109]
    assert [line["a/loss"] for line in lines_of(tmp_path)] == values
    assert board_of(tmp_path, "a/loss") == list(zip(range(1, 10), values, strict=True))


def test_what_is_cut_off_is_kept_aside(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), after=0)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    write(tmp_path, range(5, 7), after=4, value=100)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epo')
    write(tmp_path, range(7, 8), after=6)
    aside = (tmp_path / "superseded" / "metrics.jsonl").read_bytes()
    assert aside == b"".join(before[4:]) + b'{"step": 7, "epo\n'


def test_a_new_run_in_a_folder_that_was_left_starts_empty(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), after=0)
    write(tmp_path, range(1, 3), after=0, value=100)
    assert [line["a/loss"] for line in lines_of(tmp_path)] == [101, 102]
    assert board_of(tmp_path, "a/loss") == [(1, 101.0), (2, 102.0)]


@pytest.mark.parametrize(
    "torn",
    ['{"step": 4, "epoch": 0, "ti', '{"step": 4, "a/loss": 4.0}', "\0\0\0\0\n", "\0\0\0\0"],
    ids=["half a line", "all but its end", "zeros and an end", "zeros"],
)
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path, torn: str) -> None:
    write(tmp_path, range(1, 4), after=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, range(4, 6), after=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [b"{}", b"[1]", b"null", b'{"step": null}', b"\xff\xfe", b""])
def test_a_damaged_line_is_dropped_alone(tmp_path: Path, bad: bytes) -> None:
    write(tmp_path, range(1, 4), after=0)
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + b"\n" + third)
    write(tmp_path, range(4, 6), after=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3, 4, 5]


def edited(line: bytes) -> bytes:
    """Valid JSON of the same form, with another figure."""
    return line.replace(b'"a/loss": 2.0', b'"a/loss": 1.0')


def test_every_bit_of_a_line_counts(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), after=0)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert [figures and figures["a/loss"] for figures in figures_of(lines)] == [1, 2, 3]
    second = lines[1]
    assert list(figures_of([lines[0], edited(second)]))[1] is None
    for bit in range(8 * len(second)):
        changed = bytearray(second)
        changed[bit // 8] ^= 1 << bit % 8
        assert list(figures_of([lines[0], bytes(changed)]))[1] is None, changed


def test_an_edited_line_is_moved_aside_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, range(1, 4), after=0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(edited(path.read_bytes()))
    write(tmp_path, range(4, 5), after=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3, 4]
    assert "1 lines of" in caplog.text


def test_lines_of_earlier_versions_come_before_those_with_a_checksum(tmp_path: Path) -> None:
    old = [b'{"step": 1, "a/loss": 1.0}\n', b'{"step": 2, "a/loss": 2.0}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(old))
    write(tmp_path, range(3, 5), after=2)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert [figures and figures["a/loss"] for figures in figures_of(lines)] == [1, 2, 3, 4]
    assert list(figures_of([*lines, old[0]]))[-1] is None


def test_sessions_are_in_order_though_the_clock_went_back(tmp_path: Path) -> None:
    """SummaryWriter names files by the second, and TensorBoard reads them by name."""
    write(tmp_path, range(1, 4), after=0)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.9999999999.host.77.0"))
    write(tmp_path, range(3, 6), after=2, value=100)
    write(tmp_path, range(5, 6), after=4, value=200)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    expected = [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0), (5, 205.0)]
    assert board_of(tmp_path, "a/loss") == expected


def test_flush_puts_all_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint must not outlast the metrics of its steps."""
    syncs = record_syncs(monkeypatch)
    with EventWriter(tmp_path, {}, after=0) as events:
        events.write(1, 0, 1.0, {"a": 1.0})
        events.flush()
        path = tmp_path / "metrics.jsonl"
        assert syncs == [Sync(path, size=path.stat().st_size)]


def test_figures_wait_until_there_is_room(
    tmp_path: Path, little_room: LittleRoom, caplog: pytest.LogCaptureFixture
) -> None:
    with EventWriter(tmp_path, {}, after=0) as events:
        for step in range(1, 30):
            if step == 5:
                little_room(400)
            if step == 25:
                with pytest.raises(OSError, match=r"metrics\.jsonl"):
                    events.flush()
                little_room(None)
            events.write(step, 0, 1000.0, {"a/loss": float(step)})
            if step == 24:
                events.tensorboard.flush()
                *whole, torn = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
                assert None not in figures_of(whole)
                assert list(figures_of([torn])) == [None]
        events.flush()
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 30))
    said = [record.getMessage() for record in caplog.records]
    assert [("in memory" in line, "TensorBoard gets nothing more" in line) for line in said] == [
        (True, False),
        (False, True),
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_train.training.metrics_log import EventWriter
events = EventWriter(Path(sys.argv[1]), {}, after=0)
for step in range(1, 6):
    events.write(step, 0, float(step), {"a/loss": step})
    if step == 3:
        events.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_flushed_outlives_a_kill(tmp_path: Path) -> None:
    """The session that goes on from the checkpoint after step 3 writes the rest again."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment())
    assert killed.returncode == -9
    assert [line["step"] for line in lines_of(tmp_path)][:3] == [1, 2, 3]
    assert board_of(tmp_path, "a/loss")[:3] == [(1, 1.0), (2, 2.0), (3, 3.0)]
