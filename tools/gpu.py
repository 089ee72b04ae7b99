#!/usr/bin/env python3
"""Everything that only a GPU machine can tell, in one command and at most four minutes.

    python tools/gpu.py [check|tests|train|bench ...] --out DIR [--seconds N]
    python tools/gpu.py --device cpu --tiny --out DIR      # every step, without a GPU

Without stages it runs all four. DIR/results.jsonl gets one line for each result, synced at once;
DIR/log.txt has the output of the steps. Steps run in a process of their own, which is killed at its
time limit and replaced after a failure. A failed step is a line with its traceback; the other steps
still run. The exit status is 1 if anything failed. benchmarks/gpu/README.md says more.
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_record import LOG, RESULTS, ROOT, Record, log_since, log_size

#: Module gpu_STAGE has the steps of each stage. The most informative stage comes first.
STAGES = ("check", "tests", "train", "bench")
#: Time limits of a stage, and of everything.
SECONDS, TOTAL = 60.0, 240.0
#: Time limit of a step, if more than half of what its stage has left.
STEP_SECONDS = 20.0
#: Clips that the original run trained on: four for each positive, in the epochs of both phases.
VISITS = 4 * (706 * 915 + 1560 * 1115)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a stage; default 60")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds in all; default 240")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and clips")
    parser.add_argument("--commit", help="of this code; by default git tells it")
    arguments = parser.parse_args()
    unknown = [stage for stage in arguments.stages if stage not in STAGES]
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    stages = [stage for stage in STAGES if stage in (arguments.stages or STAGES)]
    os.environ["PYTHONPATH"] = python_path(os.environ.get("PYTHONPATH"))
    sys.path.insert(0, str(ROOT))
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # SIGTERM unwinds the stack, which ends the process of the steps.
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
    """This repository before the folders that PYTHONPATH names."""
    return os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [given])])


def commit_of(root: Path) -> str:
    """The commit by git, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# --- stages ---------------------------------------------------------------------------------------


def run(record: Record, stages: list[str], seconds: float, total: float) -> list[str]:
    """Run the stages; return the names of failed steps."""
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
                # Each stage begins with free memory and default settings of libraries.
                runner.drop()
    finally:
        runner.drop()
    return runner.failed()


class Runner:
    """Runs steps in a process, which it replaces after a failed step."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.pool: ProcessPoolExecutor | None = None
        self.pid = 0
        self.shown = 0

    def stage(self, stage: str, end: float) -> None:
        """Run the steps of a stage until ``end``, by ``time.monotonic``."""
        names = self.ask(replace(self.record, stage=stage, step="steps"), end) or []
        for name in names:
            record = replace(self.record, stage=stage, step=name)
            if time.monotonic() >= end:
                record.skip("there was no time left")
            else:
                self.ask(record, end, last=name == names[-1])
            self.show()

    def ask(self, record: Record, end: float, *, last: bool = False) -> Any:
        """Run one step and record its failure. The ``last`` step may take all the time left."""
        left = end - time.monotonic()
        limit = left if last else min(left, max(STEP_SECONDS, left / 2))
        failures, printed = len(self.failed()), log_size(record)
        if self.pool is None:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(1, spawn, print_to_log, (record.out,))
            self.pid = self.pool.submit(os.getpid).result()
        try:
            failure, answer = self.pool.submit(take_step, record, limit).result(limit)
        except (TimeoutError, BrokenProcessPool) as error:
            timed_out = isinstance(error, TimeoutError)
            reason = f"no end within {limit:.0f} s: killed" if timed_out else "its process died"
            failure, answer = f"{log_since(record, printed)}\n{reason}".strip(), None
        if failure is not None:
            record.fail(failure)
        if len(self.failed()) > failures:
            # CUDA errors stay with a process, and tracebacks keep memory.
            self.drop()
        return answer

    def drop(self) -> None:
        """End the process, with everything that it started."""
        from demo import kill_tree

        if self.pool is not None:
            kill_tree(self.pid)
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def failed(self) -> list[str]:
        return [
            f"{line['stage']} {line['name']}" for line in self.record.lines() if "failed" in line
        ]

    def show(self) -> None:
        """Print the new lines without tracebacks."""
        lines = self.record.lines()
        for line in lines[self.shown :]:
            rest = {k: v for k, v in line.items() if k not in ("stage", "name", "traceback")}
            print(f"{line['stage']} {line['name']}: {rest}", flush=True)
        self.shown = len(lines)


def headline(record: Record) -> None:
    """Write the last line of ``check``: the fastest step, and the hours of a whole run at it."""
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


def print_to_log(out: Path) -> None:
    log = (out / LOG).open("a", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable()


def take_step(record: Record, limit: float) -> tuple[str | None, Any]:
    """Run a step; return its traceback if it fails, and its answer. The step "steps" returns the
    names of the stage's steps."""
    # A step that hangs writes its stack to the log before it is killed.
    faulthandler.dump_traceback_later(limit * 0.9)
    try:
        steps = importlib.import_module(f"gpu_{record.stage}").steps(record)
        return None, list(steps) if record.step == "steps" else steps[record.step](record)
    except (Exception, SystemExit):
        return traceback.format_exc(), None
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
