"""launch/train_slurm.sh, with Slurm's commands replaced by small ones that start real processes.

Both "nodes" are this machine. What the small commands do is what Slurm's manual pages say of the
options that the script gives them; other options they refuse.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers import LAUNCH, ROOT, environment, metrics_of, overrides, tiny_store

SCRIPT = LAUNCH / "train_slurm.sh"
EPOCHS, STEPS = 10, 60
COMMANDS = {
    "scontrol": """
case "$1 $2" in
  "show hostnames") tr , '\\n' <<< "$3" ;;
  "requeue $SLURM_JOB_ID") echo "$2" >> "$FAKE/requeued" ;;
  *) echo "scontrol: $*?" >&2; exit 1 ;;
esac
""",
    # One task a node; ends with the highest code of any.
    "srun": """
while [[ $1 == --* ]]; do
  [[ $1 == --kill-on-bad-exit=0 || $1 == --cpus-per-task=* ]] || exit 1
  shift
done
tasks=() code=0
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node SLURMD_NODENAME=localhost "$@" &
  tasks+=($!)
  echo $! >> "$FAKE/tasks"
done
for task in "${tasks[@]}"; do
  one=0
  wait "$task" || one=$?
  ((one > code)) && code=$one
done
exit "$code"
""",
    # Without --batch the tasks get the signal, and the script does not.
    "scancel": """
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] || exit 1
xargs kill -TERM < "$FAKE/tasks"
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes; requests are noted in the folder FAKE."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{script.lstrip()}")
        (commands / name).chmod(0o755)
    return environment(
        PATH=f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        FAKE=str(tmp_path),
        SLURM_JOB_ID="4711",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="localhost,localhost",
    )


def wait_until(reached: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not reached():
        assert job.poll() is None, f"it ended too soon: {job.communicate()[0]}"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.002)


def sbatch(slurm: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """The job's script, as slurmstepd starts it."""
    (Path(slurm["FAKE"]) / "tasks").unlink(missing_ok=True)
    return subprocess.Popen(
        [SCRIPT, *arguments],
        env=slurm,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = job.communicate(timeout=120)
        return job.returncode, said
    finally:
        if job.poll() is None:
            for process in [job, *psutil.Process(job.pid).children(recursive=True)]:
                process.kill()


def requeued(slurm: dict[str, str]) -> bool:
    return (Path(slurm["FAKE"]) / "requeued").exists()


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_goes_on_when_it_runs_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    store, out = tiny_store(tmp_path / "store"), tmp_path / "run"
    settings = overrides(store, out, f"train.epochs={EPOCHS}", "snapshots.at=[10]")
    job = sbatch(slurm, *settings)
    wait_until((out / "checkpoints" / "step-8").exists, job)
    # What --signal=B:USR1@... does: to the script alone.
    job.send_signal(signal.SIGUSR1)
    code, said = ended(job)
    assert code == 75, said
    assert "which is saved" in said
    assert requeued(slurm)
    left = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*[0-9]"))
    assert 8 <= left < STEPS, "the signal came too late to show anything"
    assert metrics_of(out)[-1]["step"] == left, "no step is lost"

    (tmp_path / "requeued").unlink()
    code, said = ended(sbatch(slurm, *settings))
    assert code == 0, said
    assert not requeued(slurm)
    sessions = json.loads((out / "run.json").read_text())["sessions"]
    assert [(s["world_size"], s["resumed_from_step"]) for s in sessions] == [(2, None), (2, left)]
    assert [line["step"] for line in metrics_of(out)] == list(range(1, STEPS + 1))


# What the script makes of how its tasks end, without loading torch for it.
TASKS = {
    "tasks that end well": ("exit 0", 0, False),
    "an error of the training": ("exit 3", 3, False),
    "told at the time limit, saved": ("trap 'exit 75' TERM; tell; idle", 75, True),
    "told before training began": ("tell; idle", 128 + 15, True),
    "told when all was done": ("trap 'exit 0' TERM; tell; idle", 0, False),
}
# Once both tasks are ready and known to scancel, the first has the script told.
TELL = """
tell() {
  touch "$FAKE/ready$SLURM_NODEID"
  [[ $SLURM_NODEID == 0 ]] || return
  until [[ -e $FAKE/ready1 && $(wc -l < "$FAKE/tasks") == 2 ]]; do :; done
  kill -USR1 "$(cat "$FAKE/script")"
}
idle() { while true; do read -rt 0.1 < <(:) || true; done; }
"""


@pytest.mark.parametrize(("task", "code", "again"), TASKS.values(), ids=TASKS)
def test_when_a_job_is_put_into_the_queue_again(
    slurm: dict[str, str], tmp_path: Path, task: str, code: int, again: bool
) -> None:
    # Started in a folder of its own, the script finds another launch/torchrun.sh.
    instead = tmp_path / "launch" / "torchrun.sh"
    instead.parent.mkdir()
    instead.write_text(f"#!/bin/bash\n{TELL}\n{task}\n")
    instead.chmod(0o755)
    start = f'echo $$ > "$FAKE/script"; exec "{SCRIPT}"'
    done = subprocess.run(
        ["bash", "-c", start], env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert requeued(slurm) == again


def test_the_time_that_is_left_suffices() -> None:
    text = SCRIPT.read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert directives["requeue"] == ""
    # One launcher a node, which starts a process for each of its cards.
    assert directives["ntasks-per-node"] == "1"
    told = re.fullmatch(r"B:USR1@(\d+)", directives["signal"])
    assert told is not None, "to the script alone"
    (kill,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)
    assert int(kill) < int(told[1])
