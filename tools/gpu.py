#!/usr/bin/env python3
"""What only a GPU machine can tell, in one command and at most four minutes.

    python tools/gpu.py [check|tests|train|bench ...] --out DIR [--seconds N]
    python tools/gpu.py --device cpu --tiny --out DIR      # every step, where there is no GPU

Without stages it runs all four. DIR/results.jsonl gets one line for each figure, synced at once;
DIR/log.txt has what the steps print. Steps run in a process of their own, which is killed at its
time limit and replaced after a failure: a failure is a line with its traceback, and costs its own
step alone. The exit status is 1 if anything failed. benchmarks/gpu/README.md says more.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_record import LOG, RESULTS, ROOT, Record

#: In the order of what they tell; module gpu_STAGE has the steps of each.
STAGES = ("check", "tests", "train", "bench")
#: Time limits of a stage and of everything.
SECONDS, TOTAL = 60.0, 240.0
#: A step may take this long, or half of what its stage has left, whichever is more.
STEP_SECONDS = 20.0
#: Clips that the original run looked at: four to each positive, in the epochs of both phases.
VISITS = 4 * (706 * 915 + 1560 * 1115)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a stage; default 60")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds in all; default 240")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small nets and clips")
    parser.add_argument("--commit", help="of this code, where neither git nor .git is there")
    arguments = parser.parse_args()
    unknown = [stage for stage in arguments.stages if stage not in STAGES]
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    stages = [stage for stage in STAGES if stage in (arguments.stages or STAGES)]
    os.environ["PYTHONPATH"] = python_path(os.environ.get("PYTHONPATH"))
    sys.path.insert(0, str(ROOT))
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # So that the steps' processes are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / RESULTS
    with tempfile.TemporaryDirectory(prefix="gpu.", ignore_cleanup_errors=True) as scratch:
        record = Record(
            out=out,
            scratch=Path(scratch),
            device=arguments.device,
            tiny=arguments.tiny,
            commit=arguments.commit or commit_of(ROOT),
            began=time.monotonic(),
            first=results.stat().st_size if results.exists() else 0,
        )
        failed = run(record, stages, arguments.seconds, arguments.total)
    if failed:
        raise SystemExit(f"error: {len(failed)} failed: {', '.join(failed)}; see {results}")


def python_path(given: str | None) -> str:
    """This repository before whatever PYTHONPATH names already."""
    return os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [given])])


def commit_of(root: Path) -> str:
    """By git, or else from git's own files; "unknown" where there are none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    git = root / ".git"
    try:
        if git.is_file():
            git = root / git.read_text().partition("gitdir: ")[2].strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name, common = head.removeprefix("ref: "), git
        if (git / "commondir").is_file():
            common = git / (git / "commondir").read_text().strip()
        if (common / name).is_file():
            return (common / name).read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return "unknown"


# --- stages ---------------------------------------------------------------------------------------


def run(record: Record, stages: list[str], seconds: float, total: float) -> list[str]:
    """Names of what failed."""
    end = record.began + total
    runner = Runner(record)
    try:
        runner.stage("machine", min(record.began + seconds, end))
        if not runner.failed():
            for stage in stages:
                runner.stage(stage, min(time.monotonic() + seconds, end))
                if stage == "check":
                    headline(replace(record, stage=stage, step="headline"))
                    runner.show()
                # Stages do not meet what another one left: settings of libraries, memory.
                runner.drop()
    finally:
        runner.drop()
    return runner.failed()


class Runner:
    """Runs the steps of stages in a process that it replaces when a step failed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.worker: Worker | None = None
        self.shown = 0

    def stage(self, stage: str, end: float) -> None:
        """All steps of a stage that begin before ``end``, by ``time.monotonic``."""
        names = self.ask(replace(self.record, stage=stage, step="steps"), end) or []
        for name in names:
            record = replace(self.record, stage=stage, step=name)
            if time.monotonic() >= end:
                record.skip("there was no time left")
            else:
                self.ask(record, end, last=name == names[-1])
            self.show()

    def ask(self, record: Record, end: float, *, last: bool = False) -> Any:
        """Have one step done; its failure is recorded. The ``last`` may take all that is left."""
        left = end - time.monotonic()
        limit = left if last else min(left, max(STEP_SECONDS, left / 2))
        before = len(self.failed())
        log = self.record.out / LOG
        printed = log.stat().st_size if log.exists() else 0
        if self.worker is None:
            self.worker = Worker(record.out)
        try:
            return self.worker.ask(record, limit)
        except StepFailed as failure:
            tail = ""
            if not failure.whole:
                tail = log.read_bytes()[printed:].decode("utf-8", errors="replace")[-6000:]
            record.fail(f"{tail}\n{failure}".strip())
            self.drop()
            return None
        finally:
            if len(self.failed()) > before:
                # Errors of CUDA stay with a process, and tracebacks hold on to memory.
                self.drop()

    def drop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def failed(self) -> list[str]:
        return [
            f"{line['stage']} {line['name']}" for line in self.record.lines() if "failed" in line
        ]

    def show(self) -> None:
        """Print the lines that are new, without tracebacks."""
        lines = self.record.lines()
        for line in lines[self.shown :]:
            rest = {k: v for k, v in line.items() if k not in ("stage", "name", "traceback")}
            print(f"{line['stage']} {line['name']}: {rest}", flush=True)
        self.shown = len(lines)


def headline(record: Record) -> None:
    """The last line of ``check``: the fastest of its steps, and what that means for a whole run."""
    rows = [line for line in record.lines() if line.get("clips_per_second")]
    if not rows:
        record.fail("no step was timed")
        return
    best = max(rows, key=lambda line: float(line["clips_per_second"]))
    rate = best["clips_per_second"]
    record.line(
        clips_per_second=rate,
        reserved_gb=best["reserved_gb"],
        hours_for_the_recipe=VISITS / rate / 3600,
        of=best["name"],
    )


# --- the process of the steps ---------------------------------------------------------------------


class StepFailed(Exception):  # noqa: N818
    """``whole``: the message is the step's own traceback, so that the log has no more to say."""

    def __init__(self, message: str, *, whole: bool) -> None:
        super().__init__(message)
        self.whole = whole


class Worker:
    """A process that does steps, one after the other."""

    def __init__(self, out: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, out))
        self.process.start()
        # So that the death of the process is the end of what comes from it.
        theirs.close()

    def ask(self, record: Record, limit: float) -> Any:
        """What the step returns.

        Raises:
            StepFailed: it raised, its process died, or it took longer than ``limit`` seconds.
        """
        try:
            self.connection.send((record, limit))
            if not self.connection.poll(limit):
                raise StepFailed(f"no end within {limit:.0f} s: killed", whole=False)
            failure, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            raise StepFailed(f"its process died with exit code {code}", whole=False) from None
        if failure is not None:
            raise StepFailed(failure, whole=True)
        return answer

    def kill(self) -> None:
        """With everything that it started."""
        from demo import kill_tree

        self.connection.close()
        if self.process.pid is not None:
            kill_tree(self.process.pid)
        self.process.join()


def serve(connection: Connection, out: Path) -> None:
    """Do the steps that come through ``connection``, and print to the log."""
    log = (out / LOG).open("a", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable()
    while True:
        try:
            record, limit = connection.recv()
        except EOFError:
            return
        # A hung step leaves in the log where it hangs, before it is killed.
        faulthandler.dump_traceback_later(limit * 0.9, file=log)
        try:
            module = importlib.import_module(f"gpu_{record.stage}")
            steps = module.steps(record)
            answer = list(steps) if record.step == "steps" else steps[record.step](record)
            connection.send((None, answer))
        except (Exception, SystemExit):
            connection.send((traceback.format_exc(), None))
        finally:
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
