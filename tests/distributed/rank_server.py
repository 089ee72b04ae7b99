"""Forks the ranks of a launch, after importing once what each of them would import for seconds.

Started by ``ranks.py``. For each line of JSON on standard input, of the form ``{"argv": [...],
"envs": [{...}, ...], "logs": [...], "seconds": s}``, it runs ``python argv...`` in one process for
each environment, and answers with a line of JSON: their exit codes, negative for a signal. When one
fails the others are ended, as launchers do.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import traceback
import warnings
from pathlib import Path

# DeepSpeed picks its device when it is first imported.
os.environ["DS_ACCELERATOR"] = "cpu"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import dist_train.cli
    import dist_train.engine.backends.fsdp
    import dist_train.engine.backends.zero
    import dist_train.train  # noqa: F401


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(launched(**json.loads(line))), flush=True)


def launched(
    argv: list[str], envs: list[dict[str, str]], logs: list[str], seconds: int
) -> list[int]:
    # A thread would be lost in the forked processes, with the locks that it holds.
    assert len(list(Path("/proc/self/task").iterdir())) == 1
    places = enumerate(zip(envs, logs, strict=True))
    ranks = {forked(argv, env, log): rank for rank, (env, log) in places}
    codes = [0] * len(envs)
    signal.signal(signal.SIGALRM, lambda *_: end(ranks))
    signal.alarm(seconds)
    while ranks:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        codes[ranks.pop(pid)] = code
        if code != 0:
            end(ranks)
    signal.alarm(0)
    return codes


def end(ranks: dict[int, int]) -> None:
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def forked(argv: list[str], env: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            become(argv, env, log)
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return pid


def become(argv: list[str], env: dict[str, str], log: str) -> None:
    """``python argv...``, in this process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


main()
