"""Starts the processes of a run from one that has imported everything: tenths of a second each.

They are forked before any thread is started, and are processes like any other: of their own rank,
to be killed by their own id. Asked by lines of JSON on standard input, it answers each by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import faulty_train
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import dist_train.engine.backends.fsdp
import dist_train.engine.backends.zero  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import elastic


def train(arguments: list[str]) -> None:
    sys.argv = ["dist-train", "train", *arguments]
    # A process of torch's elastic agent is to return, rather than to leave.
    faulty_train.cli._leave_launch = lambda: None
    faulty_train.main()


def launch(options: dict[str, Any], arguments: list[str]) -> int:
    """launch/elastic.py, whose workers are forked too; the code it ends with."""
    elastic.main = lambda: elastic_launch(LaunchConfig(**options, start_method="fork"), train)(
        arguments
    )
    return elastic.run()


def started(process: dict[str, Any]) -> int:
    """Fork; the child's id. Standard output and error of the child go to its log."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(process["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ.update(process["env"])
        if "elastic" in process:
            code = launch(process["elastic"], process["arguments"])
        else:
            train(process["arguments"])
            code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pids: list[int], seconds: float) -> dict[int, int]:
    """The exit codes of those that end within so many seconds; of a signal, its negative."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return codes


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            print(json.dumps([started(process) for process in request["start"]]), file=answer)
        else:
            codes = ended(request["wait"], request["seconds"])
            print(json.dumps({str(pid): code for pid, code in codes.items()}), file=answer)
        answer.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
