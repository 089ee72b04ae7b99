"""A server that starts a process of a run in tenths of a second.

It imports everything once, and forks each process before any thread starts. A forked process has
its own rank and process id. ``launcher.py`` is the client.

Requests are lines of JSON on standard input; each is answered by one line on standard output:

- ``{"start": [process, ...]}``: starts ``python argv...`` for each process; answers with their ids.
  A process is ``{"argv": [...], "env": {...}, "log": path}``; ``"own_network": true`` gives it a
  network of its own; ``"elastic": {...}`` are options by which launch/elastic.py starts ``argv``.
- ``{"wait": [pid, ...], "seconds": s}``: answers with the exit codes of those that ended within
  ``s`` seconds, negative for a signal.
- ``{"within": [command, ...], "network": bool, "socket": path}``: forks a server with mounts, and
  perhaps a network, of its own, made by shell commands; answers with its id. It takes requests at
  the socket, and does not answer there if the system does not allow it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import IO, Any

# DeepSpeed chooses its device when it is first imported.
os.environ["DS_ACCELERATOR"] = "cpu"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # Imports that take seconds, at the start or for the first optimizer.
    for module in (
        "accelerate",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "transformers.integrations.deepspeed",
        "dist_train.distributed.backends.fsdp",
        "dist_train.distributed.backends.zero",
        "dist_train.training.trainer",
    ):
        import_module(module)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from dist_train import cli

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import elastic

#: CLONE_NEWNS, CLONE_NEWUSER and CLONE_NEWNET of sched.h.
NEW_MOUNTS, NEW_USER, NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000


def become(argv: list[str]) -> None:
    """``python argv...``, in this process."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def become_worker(argv: list[str]) -> None:
    """``become`` in a process that torch's elastic agent forked, and that must return."""
    cli._leave_launch = lambda code=0: None
    become(argv)


def launch(options: dict[str, Any], argv: list[str]) -> int:
    """Run launch/elastic.py with forked workers; its exit code."""
    config = LaunchConfig(**options, start_method="fork")
    return elastic.run(lambda: elastic_launch(config, become_worker)(argv))


def forked() -> int:
    """``os.fork``. A thread, and the locks that it holds, would be lost in the child."""
    assert len(list(Path("/proc/self/task").iterdir())) == 1
    return os.fork()


def started(process: dict[str, Any]) -> int:
    """Fork a process, whose output goes to its log; its id."""
    pid = forked()
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
            code = launch(process["elastic"], process["argv"])
        else:
            become(process["argv"])
            code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def unshare(flags: int) -> None:
    """As of Python 3.12 ``os`` has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def server_within(request: dict[str, Any]) -> int:
    """Fork a server with mounts of its own; its id."""
    pid = forked()
    if pid:
        return pid
    with contextlib.suppress(BaseException), socket.socket(socket.AF_UNIX) as client:
        client.connect(request["socket"])
        user, group = os.getuid(), os.getgid()
        unshare(NEW_USER | NEW_MOUNTS | (NEW_NETWORK if request["network"] else 0))
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")
        ):  # fmt: skip
            Path("/proc/self", name).write_text(text)
        for command in request["within"]:
            subprocess.run(command, shell=True, check=True)
        serve(client.makefile("r"), client.makefile("w"))
    os._exit(0)


def leave_network() -> None:
    """Move this process to a network of its own, joined to the server's by a pair of interfaces."""
    unshare(NEW_NETWORK)
    there = f"nsenter --net=/proc/{os.getppid()}/ns/net"
    # The kernel may not yet have removed the interface of a process that has ended.
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
    """Exit codes of the processes that end within ``seconds``; the negative of a signal."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return codes


def serve(requests: Iterable[str], answer: IO[str]) -> None:
    for line in requests:
        request, found = json.loads(line), None
        if "start" in request:
            found = [started(process) for process in request["start"]]
        elif "within" in request:
            found = server_within(request)
        else:
            codes = ended(request["wait"], request["seconds"])
            found = {str(pid): code for pid, code in codes.items()}
        print(json.dumps(found), file=answer, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(sys.stdin, os.fdopen(os.dup(1), "w"))
    # A regular exit takes seconds, for all the imported modules.
    os._exit(0)
