"""The main job from end to end, on two processes of one machine's CPUs.

400 synthetic capillary videos -> a store -> a small 3D ResNet, killed half way and resumed from its
sharded checkpoint -> predictions averaged over snapshots -> metrics and a report page. Each stage
is the command that a user would type. A finished stage is not repeated.

    python tools/demo.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("runs/demo-data")
RUN = Path("runs/demo")
CLIPS, SEED = 400, 7

DIST_TRAIN = [sys.executable, "-m", "dist_train"]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", "launch/cpu_2proc.yaml", "-m", "dist_train"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    synth = [*DIST_TRAIN, "synth", str(DATA), "--clips", str(CLIPS), "--seed", str(SEED)]
    prepare = [
        *(*DIST_TRAIN, "prepare", "--manifest", str(DATA / "train_metadata.csv")),
        *("--source", str(DATA / "videos"), "--out", str(DATA / "store"), "--shard-clips", "20"),
    ]
    train = [*LAUNCH, "train", "--config", "configs/demo_cpu.yaml", "--resume", "auto"]
    stages: dict[str, Callable[[], None]] = {
        "make videos": partial(run, synth),
        "prepare a store": partial(run, prepare),
        "train, and be killed half way": partial(run_until_half_way, train),
        "resume from the checkpoint": partial(run, train),
    }
    for command in ("predict", "evaluate", "report"):
        stages[command] = partial(run, [*DIST_TRAIN, command, str(RUN)])
    summary = summarise(run_stages(stages, RUN / "stages.json"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary}, indent=2) + "\n")
    print("\non held-out clips:")
    for name in ("mcc", "auc", "ap", "threshold", "clips_per_second", "seconds"):
        print(f"  {name:<18}{summary[name]:.3f}")
    print(f"  {'resumed':<18}{summary['resumed']} (from step {resumed_from(RUN)})")
    print(f"report: {(ROOT / summary['report']).as_uri()}")


def run_stages(stages: dict[str, Callable[[], None]], path: Path) -> float:
    """Run the stages that ``path`` does not list as finished; return the seconds of all."""
    done: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    for title, work in stages.items():
        if title in done:
            print(f"== {title}: finished before, in {done[title]:.0f} s", flush=True)
            continue
        print(f"== {title}", flush=True)
        began = time.monotonic()
        work()
        done[title] = time.monotonic() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(done, indent=2))
    return sum(done.values())


def run(command: list[str]) -> None:
    """Run one command in the terminal; its failure ends the demo."""
    print(f"$ {shown(command)}", flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: '{shown(command)}' failed; see the messages above")


def run_until_half_way(command: list[str]) -> None:
    """Start training, and kill it once half of the steps are in a checkpoint."""
    print(f"$ {shown(command)}", flush=True)
    code = run_until(command, half_way)
    if code is not None:
        sys.exit(f"error: training ended with code {code} before it was half way")
    print(f"\nkilled (SIGKILL) after step {metrics(RUN)[-1]['step']}", flush=True)


def run_until(command: list[str], reached: Callable[[], bool]) -> int | None:
    """Run a command until ``reached()``, then SIGKILL it with all its processes. Return its exit
    code if it ends before, else None."""
    launched = subprocess.Popen(command, cwd=ROOT)
    try:
        while launched.poll() is None and not reached():
            time.sleep(0.02)
        return launched.poll()
    finally:
        kill_tree(launched.pid)
        launched.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and its descendants, such as ranks and their workers.

    Returns once all have ended: until then a rank holds its run's lock and its GPU memory.
    """
    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        # A zombie, as in a container without an init, holds nothing any more.
        with suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


def half_way() -> bool:
    record = RUN / "run.json"
    steps = [int(path.name[5:]) for path in checkpoints(RUN)]
    return record.exists() and max(steps, default=0) >= json.loads(record.read_text())["steps"] // 2


def checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Complete lines of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def resumed_from(run: Path) -> int | None:
    """The step of the checkpoint that the last session resumed from."""
    sessions = json.loads((run / "run.json").read_text(encoding="utf-8"))["sessions"]
    step: int | None = sessions[-1]["resumed_from_step"]
    return step


def summarise(seconds: float) -> dict[str, Any]:
    evaluation = json.loads((RUN / "evaluation.json").read_text(encoding="utf-8"))
    rows = metrics(RUN)
    rates = sorted(row["speed/clips_per_second"] for row in rows)
    every_step_once = [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {
        **{name: evaluation[name] for name in ("mcc", "auc", "ap", "threshold")},
        "seconds": round(seconds, 1),
        "clips_per_second": round(rates[len(rates) // 2], 1),
        "resumed": every_step_once and (resumed_from(RUN) or 0) >= len(rows) // 2,
        "report": str(RUN / "report.html"),
    }


def shown(command: list[str]) -> str:
    """A command as a user would type it."""
    text = shlex.join(command).replace(
        f"{sys.executable} -m accelerate.commands.launch", "accelerate launch"
    )
    return text.replace(f"{sys.executable} -m dist_train", "dist-train")


if __name__ == "__main__":
    main()
