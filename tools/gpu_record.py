"""The results file of tools/gpu.py: one line of JSON for each figure, on the disk once written."""

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
        scratch: folder for stores and runs; it is removed in the end.
        device: "cuda" or "cpu".
        tiny: small nets and clips, by which a CPU goes through all steps in a minute.
        commit: of the code, or "unknown".
        began: of the run, by ``time.monotonic``.
        first: byte of the results file at which this run's lines begin.
        stage, step: what is at work.
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

    def line(self, name: str | None = None, /, **figures: Any) -> None:
        """Append figures; the line is synced before this returns."""
        when = round(time.monotonic() - self.began, 2)
        entry = {"stage": self.stage, "name": name or self.step, "at": when, **figures}
        with (self.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def skip(self, reason: str, name: str | None = None) -> None:
        self.line(name, skipped=reason)

    def fail(self, traceback: str, name: str | None = None, **more: Any) -> None:
        """``failed`` is the last line of the traceback that says something."""
        said = [line for line in traceback.splitlines() if line.strip()] or ["no message"]
        self.line(name, failed=said[-1].strip(), traceback=traceback, **more)

    def lines(self) -> list[dict[str, Any]]:
        """Of this run. A line that a killed process left unfinished is passed over."""
        path = self.out / RESULTS
        if not path.exists():
            return []
        text = path.read_bytes()[self.first :].decode("utf-8", errors="replace")
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found
