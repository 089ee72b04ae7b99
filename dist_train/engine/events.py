"""The numbers of a run, to TensorBoard and to JSONL at once."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from itertools import compress
from operator import not_
from pathlib import Path
from types import TracebackType

from dist_train.data.files import read_plain, write_whole
from dist_train.engine import board
from dist_train.engine.growing_file import GrowingFile
from dist_train.engine.superseded import append_aside

METRICS = "metrics.jsonl"
BOARD = "tensorboard"
#: Some ten million steps.
MOST_BYTES = 2**33
log = logging.getLogger(__name__)


class EventWriter:
    """One object a step in ``metrics.jsonl``, and the same numbers under the same names in
    ``tensorboard/``; not there where the tensorboard package is not installed.

    Args:
        run: the run's folder.
        after: steps done so far. What an earlier, killed session wrote of later steps is moved to
            ``superseded/metrics.jsonl``, so that every step is there once.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, run: Path, *, after: int) -> None:
        path = run / METRICS
        if os.path.lexists(path):
            lines = read_plain(path, most_bytes=MOST_BYTES).splitlines(keepends=True)
            kept = [_is_whole(line, after) for line in lines]
            if not all(kept):
                # Aside first: a kill in between leaves them in both places.
                append_aside(run, METRICS, compress(lines, map(not_, kept)))
                write_whole(path, b"".join(compress(lines, kept)))
        self._lines = GrowingFile(path)
        self._board: GrowingFile | None = None
        if board.is_available():
            (run / BOARD).mkdir(exist_ok=True)
            self._board = GrowingFile(board.next_file(run / BOARD))
            self._board.append(board.opening(after + 1, time.time()))
        else:
            log.warning(
                "tensorboard is not installed, so figures go to %s alone: pip install tensorboard",
                path,
            )
        self._told = False

    def write(self, step: int, epoch: int, at: float, values: Mapping[str, float | None]) -> None:
        """Numbers of step ``step`` (1 is the first); what is not finite becomes null.

        Where the disk is full they are kept in memory, with a warning, until there is room.

        Args:
            at: seconds since 1970, for display alone.
        """
        finite = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        line = {"step": step, "epoch": epoch, "time": at} | finite
        known = {name: value for name, value in finite.items() if value is not None}
        records = [(self._lines, f"{json.dumps(line)}\n".encode())]
        if self._board is not None:
            records.append((self._board, board.scalars(step, at, known)))
        for file, record in records:
            try:
                file.append(record)
            except OSError as error:
                if not self._told:
                    log.warning("figures are kept in memory until they can be written: %s", error)
                self._told = True

    def flush(self) -> None:
        """Put all that was written on the disk. Called before each checkpoint, so that a session
        which goes on from there lacks nothing of the steps before.

        Raises:
            OSError: there is no room, or the disk fails.
        """
        for file in self._files():
            file.flush()
        self._told = False

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files():
            file.close()

    def _files(self) -> list[GrowingFile]:
        return [self._lines] if self._board is None else [self._lines, self._board]


def _is_whole(line: bytes, last: int) -> bool:
    """Whether it is of a step up to ``last``. A kill or a bad disk may leave half a line."""
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= last)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
