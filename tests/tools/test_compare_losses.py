"""The command as it is typed: what it says of two runs, and how it ends."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import compare_losses
import pytest
from compare_losses import compare

LOSSES = [0.9, 0.8, None, 0.7, 0.6]


def run_of(folder: Path, losses: list[float | None], **more: float) -> Path:
    folder.mkdir()
    lines = [{"step": n, "train/loss": loss} | more for n, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def said(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the tool, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["compare_losses.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            compare_losses.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "a", LOSSES)


def test_equal_runs(run: Path, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", LOSSES)
    # A folder or its file.
    code, out, _ = said(run, other / "metrics.jsonl", "--tolerance", "0")
    assert code == 0
    assert "5 steps, largest difference 0 at step 1: the same within 0" in out


def test_the_first_step_that_differs_is_named(run: Path, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [0.9, 0.8000001, None, 0.70001, 0.6])
    code, out, _ = said(run, other, "--tolerance", "1e-6")
    assert code == 1
    assert "largest difference 1.43e-05 at step 4: more than 1e-06, first at step 4" in out
    assert "0.70001" in out
    assert said(run, other, "--tolerance", "1e-4")[0] == 0
    assert said(run, other, "--tolerance", "0", "--steps", "5:5")[0] == 0


def test_no_digit_is_dropped(run: Path, tmp_path: Path) -> None:
    """Neither by the comparison nor in the table."""
    other = run_of(tmp_path / "b", [0.9000000000000001, *LOSSES[1:]])
    code, out, _ = said(run, other, "--tolerance", "0")
    assert code == 1
    assert "0.9000000000000001" in out


def test_a_step_without_a_loss_differs_from_one_with(run: Path, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [0.9, 0.8, 0.7, 0.7, 0.6])
    compared = compare(run, other, 1e6)
    assert compared.first == 3
    assert compared.worst == (3, float("inf"))


def test_a_long_run_is_told_in_a_short_table(tmp_path: Path) -> None:
    losses = [1.0 / n for n in range(1, 1001)]
    runs = [run_of(tmp_path / "a", losses), run_of(tmp_path / "b", losses)]
    losses[776] += 1
    runs.append(run_of(tmp_path / "c", losses))
    assert said(*runs[:2], "--tolerance", "0")[1].count("\n") < 40
    _, out, _ = said(*runs[1:], "--tolerance", "0.1")
    assert "│ 777  │" in out
    assert "first at step 777" in out


def test_other_metrics(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, [0.5], **{"val/loss": 1.0}) for name in "ab"]
    assert compare(*runs, 0, figure="val/loss").first is None


def test_runs_of_other_lengths_are_not_compared(run: Path, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", LOSSES[:3])
    for pair in ((run, other), (other, run)):
        code, out, err = said(*pair, "--tolerance", "1")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {other}: has no step 4 (")
        assert "--steps FIRST:LAST compares a part" in err
    assert said(run, other, "--tolerance", "0", "--steps", "1:3")[0] == 0
    _, _, err = said(run, other, "--tolerance", "0", "--steps", "1:4")
    assert err == f"error: {other}: has no step 4; its last is 3\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", ": has a line without metrics"),
        ('{"train/loss": 1}\n', ": has a line without metrics (KeyError('step'))"),
        ('{"step": 1, "train/loss": 1}\n' * 2, ": has a step twice"),
        ("", ": no step has the metric 'train/loss'"),
        (None, ": cannot be read (No such file or directory)"),
    ],
    ids=["torn", "no step", "twice", "empty", "missing"],
)  # fmt: skip
def test_a_damaged_or_missing_file(run: Path, tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "b.jsonl"
    if text is not None:
        file.write_text(text)
    code, out, err = said(run, file, "--tolerance", "0")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}{why}")


@pytest.mark.parametrize(
    "option", [("--tolerance", "-1"), ("--tolerance", "nan"),
               ("--tolerance", "0", "--steps", "3:1"), ("--tolerance", "0", "--steps", "3"), ()]
)  # fmt: skip
def test_a_wrong_option(run: Path, option: tuple[str, ...]) -> None:
    code, out, err = said(run, run, *option)
    assert (code, out) == (2, "")
    assert "usage: " in err
