"""Starts the processes of a run from one that has imported everything: tenths of a second each.

They are forked before any thread is started, and are processes like any other: of their own rank,
to be killed by their own id. Asked by lines of JSON on standard input, it answers each by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
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
    faulty_train.cli._leave_launch = lambda code=0: None
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
        if process.get("own_network"):
            leave_network()
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


def leave_network() -> None:
    """Move this process to a network of its own, joined to the server's by a pair of interfaces."""
    new_network = 0x40000000  # CLONE_NEWNET of sched.h; os.unshare came with Python 3.12
    assert ctypes.CDLL(None, use_errno=True).unshare(new_network) == 0, ctypes.get_errno()
    there = f"nsenter --net=/proc/{os.getppid()}/ns/net"
    # The kernel takes its time to remove that of a process that has ended.
    subprocess.run(f"{there} ip link delete near".split(), stderr=subprocess.DEVNULL)
    for command in (
        f"{there} ip link add name near type veth peer name far netns {os.getpid()}",
        f"{there} ip address add 10.77.0.1/24 dev near",
        f"{there} ip link set near up",
        "ip address add 10.77.0.2/24 dev far",
        "ip link set lo up",
        "ip link set far up",
    ):
        subprocess.run(command.split(), check=True)


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
