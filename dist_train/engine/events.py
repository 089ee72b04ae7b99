"""The numbers of a run, to TensorBoard and to JSONL at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from dist_train.data.files import write_whole

METRICS = "metrics.jsonl"


class EventWriter:
    """One object a step in ``metrics.jsonl``, and the same numbers under the same names in
    ``tensorboard/``.

    Args:
        run: the run's folder.
        after: steps done so far. What an earlier, killed session wrote of later steps is dropped,
            so that every step is there once.
    """

    def __init__(self, run: Path, *, after: int) -> None:
        path = run / METRICS
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            write_whole(path, b"".join(line for line in lines if _is_whole(line, after)))
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=after + 1)

    def write(self, step: int, epoch: int, time: float, values: Mapping[str, float | None]) -> None:
        """Numbers of step ``step`` (1 is the first); what is not finite becomes null."""
        finite = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        line = {"step": step, "epoch": epoch, "time": time} | finite
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in finite.items():
            if value is not None:
                self.board.add_scalar(name, value, step, walltime=time)

    def flush(self) -> None:
        """Put all that was written on the disk. Called before each checkpoint, so that a session
        which goes on from there lacks nothing of the steps before."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        self.board.close()


def _is_whole(line: bytes, last: int) -> bool:
    """Whether it is of a step up to ``last``. A kill or a bad disk may leave half a line."""
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= last)
    except (ValueError, KeyError, TypeError):
        return False
