"""Processes of trials: on this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from dist_train.distributed.signals import TRY_AGAIN
from dist_train.errors import ConfigError, MachineError
from dist_train.safe_text import printable
from dist_train.sweep.folder import LOG
from dist_train.sweep.settings import Ray
from dist_train.system.cgroup import processes_at_once

#: The end of a trial's log in which its error is looked for.
MOST_OF_LOG = 1 << 16


class Workers(Protocol):
    """Where trials run."""

    at_once: int

    def submit(self, folder: Path) -> Future[str | None]:
        """Run the trial of a folder; the result is None, or why it failed, in one line."""

    def stop(self) -> None:
        """End all trials that run; those on this machine save a checkpoint first."""


class Local:
    """Processes of this machine. They share its CUDA devices, or else its cores, evenly."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._pool = ThreadPoolExecutor(at_once)
        self._lock, self._stops = threading.Lock(), False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for place in _places(at_once):
            self._places.put(place)

    def submit(self, folder: Path) -> Future[str | None]:
        return self._pool.submit(self._run, folder)

    def _run(self, folder: Path) -> str | None:
        place = self._places.get()
        try:
            with (folder / LOG).open("ab") as log:
                start = log.tell()
                with self._lock:
                    if self._stops:
                        return "stopped"
                    process = started(folder, log, place)
                    self._running.add(process)
                code = end_of(process)
                with self._lock:
                    self._running.discard(process)
            return reason_of_end(code, folder / LOG, start)
        finally:
            self._places.put(place)

    def stop(self) -> None:
        with self._lock:
            self._stops = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)
        self._pool.shutdown(wait=True, cancel_futures=True)


def _places(at_once: int) -> list[dict[str, str]]:
    """The environment of each place: a CUDA device, or a share of the cores."""
    import torch

    threads = {"OMP_NUM_THREADS": str(max(1, processes_at_once() // at_once))}
    # A user's own number is heeded.
    threads = threads if "OMP_NUM_THREADS" not in os.environ else {}
    if at_once == 1:
        return [{}]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(n) for n in range(torch.cuda.device_count())]
    if not seen and not devices:
        return [threads] * at_once
    return [{"CUDA_VISIBLE_DEVICES": devices[n % len(devices)]} | threads for n in range(at_once)]


def started(folder: Path, log: Any, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of a trial, which ends when this one does."""
    command = [sys.executable, "-m", "dist_train", "trial", str(folder), "--end-with-input"]
    # A session of its own: Ctrl-C reaches this process, which then stops the trials.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        env=os.environ | dict(more),
    )  # fmt: skip


def end_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a trial's process, when it has ended; its input is open until then."""
    code = process.wait()
    assert process.stdin is not None
    process.stdin.close()
    return code


def reason_of_end(code: int, log: Path, start: int) -> str | None:
    """Why a process failed, by its exit code and its part of the log; None if it did not."""
    if code == 0:
        return None
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - MOST_OF_LOG))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    told = next((line for line in lines if line.startswith("error")), None)
    if told is not None:
        return printable(told.partition(": ")[2] or told)
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as by a lack of memory" if name == "SIGKILL" else "")
    if code == TRY_AGAIN:
        return "stopped"
    return printable(lines[-1]) if lines else f"exit code {code}"


class OnRay:
    """Tasks of a Ray cluster (https://docs.ray.io), whose machines see the sweep's folder by the
    same path."""

    def __init__(self, settings: Ray, at_once: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise MachineError(
                "Ray is not installed", fix="Run: pip install 'dist_train[ray]'"
            ) from None
        self._ray: Any = ray
        # A cluster that is started here must not send usage reports.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            ray.init(settings.address, ignore_reinit_error=True, include_dashboard=False, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise MachineError(
                f"the Ray cluster cannot be reached ({error})", fix="Check ray.address."
            ) from None
        there: dict[str, float] = ray.cluster_resources()
        room = there.get("CPU", 0) / settings.cpus
        if settings.gpus:
            room = min(room, there.get("GPU", 0) / settings.gpus)
        if room < 1:
            raise ConfigError(
                f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, "
                "too few for one trial",
                where="ray",
                fix="Lower ray.cpus or ray.gpus.",
            )
        self.at_once = at_once or int(room)
        self._threads = {"OMP_NUM_THREADS": str(max(1, int(settings.cpus)))}
        # Retry a task whose node is lost: its trial goes on from its newest checkpoint.
        self._task: Any = ray.remote(
            num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=-1
        )(_on_node)
        self._running: list[Any] = []

    def submit(self, folder: Path) -> Future[str | None]:
        reference = self._task.remote(str(folder.resolve()), str(Path.cwd()), self._threads)
        self._running.append(reference)
        future: Future[str | None] = reference.future()
        return future

    def stop(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()


def _on_node(folder: str, working: str, more: Mapping[str, str]) -> str | None:
    """Run a trial inside a task. If the task is cancelled, its process ends with it."""
    os.chdir(working)
    path = Path(folder)
    with (path / LOG).open("ab") as log:
        start = log.tell()
        code = end_of(started(path, log, more))
    return reason_of_end(code, path / LOG, start)
