"""metrics.jsonl and TensorBoard: the same numbers, each step once, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import board_of
from room import LittleRoom
from syncs import Sync, record_syncs

from dist_train.training.metrics_log import EventWriter, parse_metrics


def write(run: Path, steps: range, *, after: int, value: float = 0.0) -> None:
    with EventWriter(run, {}, after=after) as events:
        for step in steps:
            events.write(step, 0, 1000.0 + step, {"a/loss": value + step, "a/gone": None})


def raw_lines(run: Path) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in raw_lines(run)]


def losses_in(lines: list[bytes]) -> list[float | None]:
    """The loss of each line; None for a damaged line."""
    return [metrics and metrics["a/loss"] for metrics in parse_metrics(lines)]


def test_numbers_go_to_both_under_the_same_names(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), after=0)
    assert list(parse_metrics(raw_lines(tmp_path)))[1] == {
        "step": 2, "epoch": 0, "time": 1002.0, "a/loss": 2.0, "a/gone": None
    }  # fmt: skip
    assert board_of(tmp_path, "a/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    with EventWriter(tmp_path, {}, after=0) as events:
        events.write(1, 0, 1.0, {"a": value, "b": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["a"] is None
    assert board_of(tmp_path, "b") == [(1, 2.0)]


def test_lines_of_steps_that_are_done_again_are_moved_aside(tmp_path: Path) -> None:
    """A line that a kill has torn is moved too. TensorBoard shows the new values only."""
    write(tmp_path, range(1, 8), after=0)
    before = raw_lines(tmp_path)
    write(tmp_path, range(5, 7), after=4, value=100)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epo')
    write(tmp_path, range(7, 10), after=6, value=100)
    values = [1.0, 2, 3, 4, 105, 106, 107, 108, 109]
    assert losses_in(raw_lines(tmp_path)) == values
    assert board_of(tmp_path, "a/loss") == list(zip(range(1, 10), values, strict=True))
    aside = (tmp_path / "superseded" / "metrics.jsonl").read_bytes()
    assert aside == b"".join(before[4:]) + b'{"step": 7, "epo\n'


def edited(line: bytes) -> bytes:
    """Change a metric; the line stays valid JSON of the same form."""
    return line.replace(b'"a/loss": 2.0', b'"a/loss": 1.0')


@pytest.mark.parametrize("bad", [b"[1]", b'{"step": null}', b"\xff\xfe", b"\0\0\0\0", b"", None])
def test_a_damaged_line_is_dropped_alone_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes | None
) -> None:
    write(tmp_path, range(1, 4), after=0)
    first, second, third = raw_lines(tmp_path)
    damaged = edited(second) if bad is None else bad + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(first + damaged + third)
    write(tmp_path, range(4, 6), after=3)
    assert steps_of(tmp_path) == [1, 3, 4, 5]
    assert "1 lines of" in caplog.text


def test_every_bit_of_a_line_counts(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), after=0)
    first, second = raw_lines(tmp_path)
    for bit in range(8 * len(second)):
        changed = bytearray(second)
        changed[bit // 8] ^= 1 << bit % 8
        assert losses_in([first, bytes(changed)])[1] is None, changed


def test_lines_of_earlier_versions_come_before_those_with_a_checksum(tmp_path: Path) -> None:
    old = [b'{"step": 1, "a/loss": 1.0}\n', b'{"step": 2, "a/loss": 2.0}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(old))
    write(tmp_path, range(3, 5), after=2)
    assert losses_in([*raw_lines(tmp_path), old[0]]) == [1, 2, 3, 4, None]


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


def test_metrics_wait_until_there_is_room(
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
                *whole, torn = losses_in(raw_lines(tmp_path))
                assert None not in whole
                assert torn is None
        events.flush()
    assert steps_of(tmp_path) == list(range(1, 30))
    in_memory, given_up = caplog.messages
    assert "in memory" in in_memory
    assert "TensorBoard gets nothing more" in given_up
