"""Start launches of several ranks through the server ``warm.py``, and wait for their ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from faults import Fault, as_json
from helpers import ROOT, environment, free_port

HERE = Path(__file__).parent
#: ``dist-train train`` with faults, as a program.
TRAIN = str(HERE / "faulty_train.py")
#: After this time the processes of a launch are killed.
SECONDS = 120


@dataclass
class Group:
    """Processes that were started together: the ranks of a run, or one launcher."""

    launcher: Launcher
    pids: list[int]
    logs: list[Path]

    def codes(self, seconds: float = SECONDS) -> list[int]:
        """Exit code of each process; the negative of the signal that killed it."""
        ended = self.launcher.ask({"wait": self.pids, "seconds": seconds})
        left = [pid for pid in self.pids if str(pid) not in ended]
        if left:
            self.kill(left)
            raise AssertionError(f"{len(left)} still ran after {seconds} s: {self.said()}")
        return [ended[str(pid)] for pid in self.pids]

    def well(self) -> Group:
        """Wait until all have ended, all with code 0."""
        assert self.codes() == [0] * len(self.pids), self.said()
        return self

    def said(self, rank: int | None = None) -> str:
        """Standard output and error of one process, or of all."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text() for log in logs if log.exists())

    def signal(self, number: int, rank: int) -> None:
        """Send a signal, and wait until the process has taken it."""
        os.kill(self.pids[rank], number)
        status = Path(f"/proc/{self.pids[rank]}/status")

        def taken() -> bool:
            pending = [line for line in status.read_text().splitlines() if "Pnd:" in line]
            return not any(int(line.split()[1], 16) >> number - 1 & 1 for line in pending)

        self.wait_for(taken)

    def kill(self, pids: Sequence[int]) -> None:
        family = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        # The launchers first, so that they start nothing again.
        for member in family + [c for p in family for c in p.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.launcher.ask({"wait": list(pids), "seconds": 30})

    def wait_for(self, reached: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"it never came so far: {self.said()}"
            assert all(map(psutil.pid_exists, self.pids)), self.said()
            time.sleep(0.01)


class Launcher:
    """Client of one server, used by all tests of a session."""

    def __enter__(self) -> Launcher:
        self._folder = TemporaryDirectory(prefix="faults-")
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(HERE / "warm.py")],
            env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._number = 0
        return self

    @contextmanager
    def within(self, *commands: str, network: bool = False) -> Iterator[tuple[Launcher, int]]:
        """A launcher, and its server's id, with mounts of its own, as shell commands make them.

        Args:
            network: it has a network of its own, too, which it may join others to.
        """
        inner = Launcher()
        with TemporaryDirectory(prefix="faults-") as folder, socket.socket(socket.AF_UNIX) as told:
            told.bind(f"{folder}/socket")
            told.listen()
            request = {"within": commands, "network": network, "socket": f"{folder}/socket"}
            pid = self.ask(request)
            told.settimeout(30)
            with told.accept()[0] as server:
                inner._requests, inner._answers = server.makefile("w"), server.makefile("r")
                inner._folder, inner._number = self._folder, 10**6 * pid
                try:
                    inner.ask({"wait": [], "seconds": 0})
                except (ValueError, OSError):
                    pytest.skip("no namespace of one's own is allowed here")
                yield inner, pid
                inner._requests.close()
                inner._answers.close()
        assert self.ask({"wait": [pid], "seconds": 30}) == {str(pid): 0}

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)
        self._folder.cleanup()

    def ask(self, request: dict[str, Any]) -> Any:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return json.loads(self._answers.readline())

    def run(
        self,
        world: int,
        settings: Sequence[str] | Callable[[int], Sequence[str]],
        *,
        resume: bool = False,
        faults: Sequence[Fault] = (),
        networks: bool = False,
        **more: str,
    ) -> Group:
        """``program`` with ``faulty_train.py`` and settings: of all ranks, or by rank."""
        options = ("--resume", "auto") if resume else ()

        def argv(rank: int) -> list[str]:
            own = settings(rank) if callable(settings) else settings
            return [TRAIN, *options, *own]

        return self.program(world, argv, faults=faults, networks=networks, **more)

    def program(
        self,
        world: int,
        argv: Sequence[object] | Callable[[int], Sequence[object]],
        *,
        faults: Sequence[Fault] = (),
        networks: bool = False,
        **more: str,
    ) -> Group:
        """Start ``python argv...`` on each rank with the environment of a launcher, which would not
        start it again; a rank alone without.

        Args:
            argv: of all ranks, or by rank.
            faults: for ``faulty_train.py``.
            networks: rank 1 is on a host of its own, joined to rank 0's by a cable.
            more: environment variables.
        """
        folder, env = self._place(faults)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(world):
            own = argv(rank) if callable(argv) else argv
            ranked = {
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }
            if world == 1:
                ranked = {}
            if networks:
                ranked |= {
                    "MASTER_ADDR": "10.77.0.1",
                    "GLOO_SOCKET_IFNAME": ("near", "far")[rank],
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                }
            processes.append(
                {
                    "env": env | ranked | more,
                    "argv": list(map(str, own)),
                    "log": str(folder / f"{rank}.log"),
                    "own_network": networks and rank == 1,
                }
            )
        return self._start(processes)

    def elastic(
        self,
        settings: Sequence[str],
        *,
        faults: Sequence[Fault] = (),
        nodes: int = 1,
        restarts: int = 10,
        struck: Path | None = None,
        grace: int = 30,
    ) -> Group:
        """Start launch/elastic.py, once for each node, all on this machine.

        Args:
            struck: folder that notes which faults struck, to share it with an earlier launcher.
        """
        folder, env = self._place(faults, struck)
        endpoint = f"127.0.0.1:{free_port()}"
        options = {
            "min_nodes": 1,
            "max_nodes": nodes,
            "nproc_per_node": 2,
            "run_id": "test",
            "rdzv_backend": "c10d",
            "rdzv_endpoint": endpoint,
            "local_addr": "127.0.0.1",
            "max_restarts": restarts,
            "monitor_interval": 0.05,
            "shutdown_timeout": grace,
        }
        waits = {"last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 3}
        return self._start(
            [
                {
                    "env": env,
                    "argv": [TRAIN, "--resume", "auto", *settings],
                    "log": str(folder / f"{node}.log"),
                    "elastic": options | {"rdzv_configs": waits | {"is_host": node == 0}},
                }
                for node in range(nodes)
            ]
        )

    def _place(
        self, faults: Sequence[Fault], folder: Path | None = None
    ) -> tuple[Path, dict[str, str]]:
        self._number += 1
        place = Path(self._folder.name) / str(self._number)
        place.mkdir()
        written = (folder or place) / "faults.json"
        written.parent.mkdir(exist_ok=True)
        written.write_text(json.dumps([as_json(fault) for fault in faults]))
        return place, {"FAULTS": str(written), "OMP_NUM_THREADS": "1"}

    def _start(self, processes: list[dict[str, Any]]) -> Group:
        pids = self.ask({"start": processes})
        return Group(self, pids, [Path(process["log"]) for process in processes])
