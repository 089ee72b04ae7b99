"""The main job from end to end, on two processes of one machine's CPUs.

400 synthetic capillary videos -> a store -> a small 3D ResNet, killed half way and resumed from its
sharded checkpoint -> predictions averaged over snapshots -> figures and a report page. Each stage
is the command that a user would type; a stage that is finished is not done again.

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
import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("runs/demo-data")
RUN = Path("runs/demo")
CONFIG = Path("configs/demo_cpu.yaml")
CLIPS, SEED = 400, 7

DIST_TRAIN = [sys.executable, "-m", "dist_train"]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", "launch/cpu_2proc.yaml", "-m", "dist_train"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there too, under 'summary'")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    stages = Stages(RUN / "stages.json")
    synth = [*DIST_TRAIN, "synth", str(DATA), "--clips", str(CLIPS), "--seed", str(SEED)]
    stages.run("make videos", partial(run, synth))
    prepare = [
        *(*DIST_TRAIN, "prepare", "--manifest", str(DATA / "train_metadata.csv")),
        *("--source", str(DATA / "videos"), "--out", str(DATA / "store"), "--shard-clips", "20"),
    ]
    stages.run("prepare a store", partial(run, prepare))
    train = [*LAUNCH, "train", "--config", str(CONFIG), "--resume", "auto"]
    stages.run("train, and be killed half way", partial(run_until_half_way, train))
    stages.run("resume from the checkpoint", partial(run, train))
    for command in ("predict", "evaluate", "report"):
        stages.run(command, partial(run, [*DIST_TRAIN, command, str(RUN)]))
    summary = summarise(stages.seconds())
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary}, indent=2) + "\n")
    print_summary(summary)


class Stages:
    """Which stages are done, and how long each took, across calls of the demo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, title: str, work: Callable[[], None]) -> None:
        if title in self.done:
            print(f"== {title}: done before, in {self.done[title]:.0f} s", flush=True)
            return
        print(f"== {title}", flush=True)
        began = time.monotonic()
        work()
        self.done[title] = time.monotonic() - began
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.done, indent=2))

    def seconds(self) -> float:
        return sum(self.done.values())


def run(command: list[str]) -> None:
    """Run one command in the terminal's own output; its failure ends the demo."""
    print(f"$ {shown(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"error: '{shown(command)}' failed; what went wrong is said above")


def run_until_half_way(command: list[str]) -> None:
    """Start training, and SIGKILL all its processes once half of the steps are checkpointed."""
    print(f"$ {shown(command)}", flush=True)
    launched = subprocess.Popen(command)
    try:
        while launched.poll() is None and not half_way():
            time.sleep(0.2)
        ended = launched.poll()
    finally:
        kill_tree(launched.pid)
        launched.wait()
    if ended is not None:
        sys.exit(f"error: training ended with code {ended} before it was half way")
    print(f"\nkilled (SIGKILL) after step {metrics()[-1]['step']}", flush=True)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it started, such as ranks and their workers.

    Returns once all of them have ended: a rank holds its run's lock and its GPU memory until then.
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
        # One that nobody reaps, as in a container without an init, holds nothing any more.
        with suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


def half_way() -> bool:
    record = RUN / "run.json"
    if not record.exists():
        return False
    steps = [int(path.name[5:]) for path in checkpoints()]
    total: int = json.loads(record.read_text(encoding="utf-8"))["steps"]
    return max(steps, default=0) >= total // 2


def checkpoints() -> list[Path]:
    return [p for p in (RUN / "checkpoints").glob("step-*") if p.name[5:].isdigit()]


def metrics() -> list[dict[str, Any]]:
    lines = (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summarise(seconds: float) -> dict[str, Any]:
    judged = json.loads((RUN / "evaluation.json").read_text(encoding="utf-8"))
    sessions = json.loads((RUN / "run.json").read_text(encoding="utf-8"))["sessions"]
    rates = sorted(row["speed/clips_per_second"] for row in metrics())
    return {
        "mcc": judged["mcc"],
        "auc": judged["auc"],
        "ap": judged["ap"],
        "threshold": judged["threshold"],
        "seconds": round(seconds, 1),
        "clips_per_second": round(rates[len(rates) // 2], 1),
        "resumed": came_from_checkpoint(sessions),
        "report": str(RUN / "report.html"),
    }


def came_from_checkpoint(sessions: list[dict[str, Any]]) -> bool:
    """Whether the last session went on from a checkpoint of at least half of the steps, and every
    step is there once."""
    every = [row["step"] for row in metrics()]
    resumed = sessions[-1]["resumed_from_step"]
    return (
        len(sessions) > 1
        and resumed is not None
        and resumed >= len(every) // 2
        and every == list(range(1, len(every) + 1))
    )


def print_summary(summary: dict[str, Any]) -> None:
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    sessions = json.loads((RUN / "run.json").read_text(encoding="utf-8"))["sessions"]
    print(f"\n{settings['model']['name']} on held-out clips it was never tuned on:")
    for name in ("mcc", "auc", "ap", "threshold", "clips_per_second", "seconds"):
        print(f"  {name:<18}{summary[name]:.3f}")
    print(f"  {'resumed':<18}{summary['resumed']} (from step {sessions[-1]['resumed_from_step']})")
    print(f"report: {(ROOT / summary['report']).as_uri()}")


def shown(command: list[str]) -> str:
    """A command as a user would type it."""
    text = shlex.join(command).replace(
        f"{sys.executable} -m accelerate.commands.launch", "accelerate launch"
    )
    return text.replace(f"{sys.executable} -m dist_train", "dist-train")


if __name__ == "__main__":
    main()
