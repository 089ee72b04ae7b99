"""The one command for a GPU machine: every step runs on a CPU, and none can take the rest along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gpu
import gpu_tests
import psutil
import pytest
from demo import kill_tree
from gpu_record import LOG, RESULTS, Record
from helpers import ROOT, environment

#: A stage whose steps go wrong in every way.
FAKE = """
import os, signal, threading

def steps(record):
    return dict(well=well, raises=raises, hangs=hangs, dies=dies, exits=exits, last=well)

def well(record):
    print("a word of", record.step, flush=True)
    record.line(pid=os.getpid(), value=1.5)

def raises(record):
    record.line("before", value=2)
    raise ValueError("as it must")

def hangs(record):
    print("it hangs now", flush=True)
    threading.Event().wait()

def dies(record):
    os.kill(os.getpid(), signal.SIGKILL)

def exits(record):
    raise SystemExit("error: told by a tool")
"""


def record_in(folder: Path, **more: Any) -> Record:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    fixed = {"device": "cpu", "tiny": True, "commit": "unknown", "first": 0}
    return Record(out=out, scratch=folder, began=time.monotonic(), **fixed | more)


def tool(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(**more), capture_output=True, text=True
    )


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


# --- a run of all stages --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("compiler", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_every_stage_runs_on_a_cpu(tmp_path: Path, compiler: bool) -> None:
    """At a tiny size, with time limits for a busy machine. Without a compiler no row is compiled,
    which takes longer than to run them all."""
    out = tmp_path / "out"
    path = {} if compiler else {"PATH": str(tmp_path)}
    command = ["--device", "cpu", "--tiny", "--seconds", "400", "--total", "650"]
    done = tool("tools/gpu.py", *command, "--out", str(out), **path)
    lines = lines_of(out)
    assert [line for line in lines if "failed" in line] == []
    assert done.returncode == 0, done.stderr
    assert list(dict.fromkeys(line["stage"] for line in lines)) == ["machine", *gpu.STAGES]
    assert {"commit", "python", "torch", "versions", "smi"} <= lines[0].keys()
    by_name = {(line["stage"], line["name"]): line for line in lines}
    # Steps that need CUDA are skipped, with the reason.
    cuda_only = [("check", "graph"), ("bench", "graphs"), ("train", "torchrun, NCCL")]
    assert all("CUDA" in by_name[key]["skipped"] for key in cuda_only)
    cuda_tests = [line for line in lines if line["stage"] == "tests"]
    assert len(cuda_tests) > 10
    assert all("CUDA" in line["skipped"] for line in cuda_tests)

    check = [line for line in lines if line["stage"] == "check"]
    rates = [line["clips_per_second"] for line in check[:-1] if "clips_per_second" in line]
    assert len(rates) == 3
    assert (check[-1]["name"], check[-1]["clips_per_second"]) == ("headline", max(rates))
    hours = check[-1]["hours_for_the_recipe"]
    assert hours * 3600 * max(rates) == pytest.approx(gpu.VISITS)

    for launcher in ("train", "torchrun"):
        resumed = by_name["train", f"{launcher}, resumed"]
        killed = by_name["train", f"{launcher}, killed"]
        assert 0 < resumed["resumed_from_step"] <= killed["after_step"]
        assert resumed["resumed_from_step"] < resumed["steps"]
        assert resumed["loss_of_last_epoch"] < resumed["loss_of_first_epoch"]
        assert resumed["val_mcc"] > 0.5
    # A bright middle is easy to see.
    assert by_name["train", "train, predicted"]["auc"] > 0.9

    assert {name for stage, name in by_name if stage == "bench"} >= {
        *("batch16", "batch32", "graphs", "fused_norm", "fast", "original", "profile"),
        *("loader, ours", "loader, ours, native", "checkpoint"),
    }
    assert ("skipped" in by_name["bench", "fused_norm"]) is not compiler


# --- failures -------------------------------------------------------------------------------------


def test_a_step_that_goes_wrong_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu_fake.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "STEP_SECONDS", 4.0)
    record = record_in(tmp_path)
    runner = gpu.Runner(record)
    try:
        # A hung step is killed after the larger of STEP_SECONDS and half of what is left.
        runner.stage("fake", time.monotonic() + 12)
    finally:
        runner.drop()
    lines = record.lines()
    assert [line["name"] for line in lines] == [
        *("well", "before", "raises", "hangs", "dies", "exits", "last"),
    ]
    by_name = {line["name"]: line for line in lines}
    assert by_name["raises"]["failed"] == "ValueError: as it must"
    assert "in raises" in by_name["raises"]["traceback"]
    assert "killed" in by_name["hangs"]["failed"]
    # What it printed, and where it hung.
    assert "it hangs now" in by_name["hangs"]["traceback"]
    assert "in hangs" in by_name["hangs"]["traceback"]
    assert "its process died" in by_name["dies"]["failed"]
    assert "told by a tool" in by_name["exits"]["failed"]
    assert by_name["last"]["pid"] != by_name["well"]["pid"]
    assert runner.failed() == [f"fake {name}" for name in ("raises", "hangs", "dies", "exits")]
    assert "a word of last" in (record.out / LOG).read_text()


def test_steps_that_find_no_time_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_in(tmp_path)
    runner = gpu.Runner(record)
    monkeypatch.setattr(runner, "ask", lambda *_, **__: ["well", "last"])
    runner.stage("fake", time.monotonic())
    assert [line["skipped"] for line in record.lines()] == 2 * ["there was no time left"]


def test_a_machine_without_cuda_is_one_message(tmp_path: Path) -> None:
    done = tool("tools/gpu.py", "check", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "sees no CUDA device here" in done.stdout
    assert done.stderr.startswith("error: 1 failed: machine machine")
    assert {line["stage"] for line in lines_of(tmp_path)} == {"machine"}


def test_unfinished_lines_and_older_runs_are_ignored(tmp_path: Path) -> None:
    older = record_in(tmp_path)
    older.line("old", value=1)
    record = record_in(tmp_path, first=(older.out / RESULTS).stat().st_size)
    record.line("new", value=2)
    with (record.out / RESULTS).open("a") as file:
        file.write('{"stage": "check", "na')
    assert [line["name"] for line in record.lines()] == ["new"]


def test_a_headline_without_a_timed_step_is_a_failure(tmp_path: Path) -> None:
    record = record_in(tmp_path, stage="check", step="headline")
    gpu.headline(record)
    assert record.lines()[0]["failed"] == "no step was timed"


def test_a_given_pythonpath_is_kept() -> None:
    assert gpu.python_path("/a:/b").split(os.pathsep)[-2:] == ["/a", "/b"]


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu.commit_of(tmp_path) == "unknown"


# --- the CUDA tests -------------------------------------------------------------------------------


def test_files_without_cuda_tests_are_not_imported() -> None:
    names = [file.name for file in gpu_tests.cuda_files(ROOT / "tests")]
    assert "test_cuda_step.py" in names
    assert "test_gpu.py" not in names
    assert "test_train.py" not in names


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        # Without plugins, as on a machine that has pytest alone.
        ("hypothesis", "there is no CUDA device"),
        ("av", "ModuleNotFoundError: import of av halted"),
        ("pytest", "pytest is not installed"),
    ],
)
def test_the_cuda_tests_need_neither_hypothesis_nor_decoders(
    tmp_path: Path, lacks: str, said: str
) -> None:
    name = "data/loading/test_collate.py" if lacks == "av" else "checkpoint/test_host_buffers.py"
    file = f"tests/{name}"
    program = f"""
import sys, time
sys.modules[{lacks!r}] = None
from pathlib import Path
import gpu_tests
from gpu_record import Record
out = Path(sys.argv[1])
record = Record(out, out, "cpu", True, "unknown", time.monotonic(), 0, "tests")
gpu_tests.run_file(Path({file!r}).resolve(), record)
"""
    path = gpu.python_path(os.environ.get("PYTHONPATH"))
    plugins = {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = tool("-c", program, str(tmp_path), **plugins)
    assert done.returncode == 0, done.stderr + done.stdout
    (line,) = lines_of(tmp_path)
    assert said in line["skipped"]


# --- killing --------------------------------------------------------------------------------------


def test_a_killed_tree_is_gone_when_it_returns() -> None:
    """A rank that still ends would hold its run's lock, and its memory on the card."""
    waits = "import threading; threading.Event().wait()"
    program = f"""
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", {waits!r}], start_new_session=True)
print(child.pid, flush=True)
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as launched:
        assert launched.stdout is not None
        child = psutil.Process(int(launched.stdout.readline()))
        kill_tree(launched.pid)
        with suppress(psutil.NoSuchProcess):
            assert child.status() == psutil.STATUS_ZOMBIE
    assert launched.returncode == -9
    kill_tree(launched.pid)
