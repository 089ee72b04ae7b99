"""Launches of many ranks, quickly: see ``rank_server.py``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT, environment, free_port

#: Longest that a launch may take. Its processes are killed then.
SECONDS = 240


@dataclass(frozen=True)
class Ended:
    """Of each rank: its exit code, negative for a signal, and what it said."""

    codes: list[int]
    said: list[str]


class Ranks:
    """Starts Python programs as the ranks of a launch on this machine, with the environment that
    torchrun and ``accelerate launch`` give. To be closed."""

    def __init__(self) -> None:
        server = Path(__file__).with_name("rank_server.py")
        self._server = subprocess.Popen(
            [sys.executable, str(server)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
            text=True,
        )

    def run(self, world: int, argv: Sequence[object], **env: str) -> Ended:
        """``python argv...`` on ``world`` ranks, to its end."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / str(rank) for rank in range(world)]
            request = {
                "argv": list(map(str, argv)),
                "envs": [
                    {**meeting, "WORLD_SIZE": str(world), "RANK": str(rank)}
                    | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), **env}
                    for rank in range(world)
                ],
                "logs": list(map(str, logs)),
                "seconds": SECONDS,
            }
            print(json.dumps(request), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
            assert answer, "the server of ranks has died"
            said = [log.read_text(errors="replace") for log in logs]
        return Ended(json.loads(answer), said)

    def run_well(self, world: int, *argv: object, **env: str) -> Ended:
        """``run`` of what must succeed."""
        ended = self.run(world, argv, **env)
        assert ended.codes == [0] * world, "\n".join(ended.said)
        return ended

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()
