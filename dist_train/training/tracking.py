"""Sends the metrics of a run to MLflow and Weights & Biases, beside the training.

Each service has a thread and a queue of its own, so a slow one delays nothing, and one that fails
is told once. ``metrics.jsonl`` has all metrics in any case.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import pandas as pd

from dist_train.distributed.backends.trackers import PACKAGES, start_tracker
from dist_train.errors import FileError
from dist_train.files import parse_object, read_plain, write_whole

#: Most steps that wait for a service; further ones are left out.
MOST_WAITING = 10_000
#: Seconds between two batches of steps.
PAUSE = 2.0
#: Seconds that the end of a session waits for a service.
LAST_WAIT = 30.0
log = logging.getLogger(__name__)

Values = Mapping[str, float]


class Tracking:
    """Sends each step once, also in sessions that repeat steps.

    The run's folder has the id that a service gave the run, and the last step sent, in
    ``mlflow.json`` and ``wandb.json``. The step is noted before it is sent: after a crash the
    service may lack some steps, but has none twice.

    Args:
        names: "mlflow", "wandb", or both.
        run: the run's folder.
        settings: settings of the run: a nested mapping of JSON types.
    """

    def __init__(self, names: Iterable[str], run: Path, settings: Mapping[str, Any]) -> None:
        (flat,) = pd.json_normalize(dict(settings)).to_dict("records")
        self._services = [
            _Service(name, run, {str(k): v for k, v in flat.items()}) for name in names
        ]

    def write(self, step: int, values: Values) -> None:
        """Send the metrics of a step, counted from 1, without waiting."""
        for service in self._services:
            service.write(step, values)

    def close(self) -> None:
        """Send what is left, for at most ``LAST_WAIT`` seconds."""
        for service in self._services:
            service.end()
        for service in self._services:
            service.wait()


def services(track: Collection[str]) -> list[str]:
    """Those of ``track`` that are services, once each."""
    return [name for name in PACKAGES if name in track]


class _Service:
    """One service, and the thread that talks to it."""

    def __init__(self, name: str, run: Path, settings: dict[str, Any]) -> None:
        self._name, self._run, self._settings = name, run, settings
        self._note = run / f"{name}.json"
        self._queue: Queue[tuple[int, Values]] = Queue(MOST_WAITING)
        self._ended, self._has_warned = Event(), False
        self._thread = Thread(target=self._send_all, name=f"track-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Values) -> None:
        if self._thread.is_alive():
            try:
                self._queue.put_nowait((step, values))
            except Full:
                self._warn("it is too slow: steps are left out")

    def end(self) -> None:
        self._ended.set()

    def wait(self) -> None:
        self._thread.join(LAST_WAIT)
        if self._thread.is_alive():
            self._warn(f"it has not answered for {LAST_WAIT:g} seconds: the last steps may lack")

    def _send_all(self) -> None:
        try:
            known = self._read_note()
            tracker, run_id = start_tracker(self._name, self._run, known.get("id"))
            if "id" not in known or self._name != "mlflow":
                # MLflow refuses to change them.
                tracker.store_init_configuration(self._settings)
            last = int(known.get("step", 0))
            self._write_note(run_id, last)
            is_last = False
            while not is_last:
                is_last = self._ended.wait(PAUSE)
                batch = [(step, values) for step, values in self._waiting() if step > last]
                if batch:
                    last = batch[-1][0]
                    self._write_note(run_id, last)
                for step, values in batch:
                    tracker.log(self._named(values), step=step)
            tracker.finish()
        # Each service, and the network below it, has errors of its own.
        except Exception as error:
            self._warn(f"it gets nothing more of this session ({error})")

    def _waiting(self) -> list[tuple[int, Values]]:
        found: list[tuple[int, Values]] = []
        with suppress(Empty):
            while True:
                found.append(self._queue.get_nowait())
        return found

    def _named(self, values: Values) -> dict[str, float]:
        """Metrics by names that the service takes: MLflow has no "@"."""
        if self._name != "mlflow":
            return dict(values)
        return {re.sub(r"[^\w./ -]", "_", name): value for name, value in values.items()}

    def _read_note(self) -> dict[str, Any]:
        # Without a readable note the run is a new one there.
        with suppress(FileError, OSError, ValueError):
            return parse_object(read_plain(self._note, most_bytes=2**16))
        return {}

    def _write_note(self, run_id: str, step: int) -> None:
        write_whole(self._note, json.dumps({"id": run_id, "step": step}))

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            log.warning("%s: %s; metrics.jsonl has all", self._name, what)
        self._has_warned = True
