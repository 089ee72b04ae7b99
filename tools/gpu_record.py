"""The results file of tools/gpu.py: one line of JSON for each result, synced once written."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, LOG = "results.jsonl", "log.txt"


@dataclass(frozen=True)
class Record:
    """Where one run of tools/gpu.py writes, and how large its work is.

    Attributes:
        out: folder of the results file and the log.
        scratch: folder for stores and runs; it is removed at the end.
        device: "cuda" or "cpu".
        tiny: small models and clips, with which a CPU runs all steps in a minute.
        commit: of the code, or "unknown".
        began: start of the run, by ``time.monotonic``.
        first: byte of the results file at which this run's lines begin.
        stage, step: the step that runs.
    """

    out: Path
    scratch: Path
    device: str
    tiny: bool
    commit: str
    began: float
    first: int
    stage: str = "machine"
    step: str = "machine"

    def line(self, name: str | None = None, /, **results: Any) -> None:
        """Append results; the line is synced before this returns."""
        when = round(time.monotonic() - self.began, 2)
        entry = {"stage": self.stage, "name": name or self.step, "at": when, **results}
        with (self.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def skip(self, reason: str, name: str | None = None) -> None:
        self.line(name, skipped=reason)

    def fail(self, traceback: str, name: str | None = None, **more: Any) -> None:
        """``failed`` is the last line of the traceback that is not blank."""
        lines = [line for line in traceback.splitlines() if line.strip()] or ["no message"]
        self.line(name, failed=lines[-1].strip(), traceback=traceback, **more)

    def lines(self) -> list[dict[str, Any]]:
        """Lines of this run, except one that a killed process left unfinished."""
        path = self.out / RESULTS
        text = path.read_bytes()[self.first :] if path.exists() else b""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1:] == b"\n"]


def log_size(record: Record) -> int:
    log = record.out / LOG
    return log.stat().st_size if log.exists() else 0


def log_since(record: Record, size: int) -> str:
    """The end of the log's text after its first ``size`` bytes."""
    return (record.out / LOG).read_bytes()[size:].decode("utf-8", errors="replace")[-6000:]
