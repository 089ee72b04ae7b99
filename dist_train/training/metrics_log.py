"""Writes the metrics of each step to ``metrics.jsonl`` and to TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from operator import not_
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_train.checkpoint.superseded import SUPERSEDED, append_aside
from dist_train.files import crc32c, parse_object, plain_descriptor, read_plain, write_whole
from dist_train.run.folder import BOARD, METRICS
from dist_train.training.tensorboard_writer import TensorBoardWriter

#: Some ten million steps.
MOST_BYTES = 2**33
Figures = dict[str, Any]
_SUMMED = re.compile(rb'(?P<rest>.*), "crc32c": (?P<sum>[0-9]{1,10})\}\n?', re.DOTALL)
log = logging.getLogger(__name__)


class EventWriter:
    """Writes one line per step to ``metrics.jsonl``, with its checksum, and the same metrics under
    the same names to ``tensorboard/``.

    Attributes:
        tensorboard: takes pictures and curves, which ``metrics.jsonl`` does not hold.

    Args:
        run: the run's folder.
        settings: settings of the run, JSON types, shown by TensorBoard.
        after: steps done so far. Lines of later steps, written by a session that was killed, are
            moved to ``superseded/metrics.jsonl``, so that every step has one line.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any], *, after: int) -> None:
        self._path = path = run / METRICS
        if os.path.lexists(path):
            lines = read_plain(path, most_bytes=MOST_BYTES).splitlines(keepends=True)
            found = list(figures_of(lines))
            kept = [figures is not None and figures["step"] <= after for figures in found]
            # A kill may tear the last line.
            damaged = found[:-1].count(None)
            if damaged:
                log.warning(
                    "%d lines of %s are not as they were written, and are moved to %s/",
                    damaged, path, SUPERSEDED,
                )  # fmt: skip
            if not all(kept):
                # Aside first: a kill in between leaves them in both places.
                append_aside(run, METRICS, compress(lines, map(not_, kept)))
                write_whole(path, b"".join(compress(lines, kept)))
        self._descriptor = plain_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._waiting = bytearray()
        self.tensorboard = TensorBoardWriter(run / BOARD, after + 1, settings)
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
        self._waiting += _line(line)
        try:
            self._write()
        except OSError as error:
            if not self._told:
                log.warning("metrics are kept in memory until they can be written: %s", error)
            self._told = True
        known = {name: value for name, value in finite.items() if value is not None}
        self.tensorboard.scalars(step, at, known)

    def flush(self) -> None:
        """Sync all lines to the disk. Called before each checkpoint, so that a session that resumes
        from it has the metrics of all earlier steps.

        Raises:
            OSError: there is no room, or the disk fails.
        """
        self._write()
        os.fsync(self._descriptor)
        self._told = False
        self.tensorboard.flush()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
        self.tensorboard.close()

    def _write(self) -> None:
        # A full disk takes part of a line, and later the rest of it.
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            error.filename = str(self._path)
            raise


def figures_of(lines: Iterable[bytes]) -> Iterator[Figures | None]:
    """What each line of ``metrics.jsonl`` says; None for a line that is not as it was written.

    Lines of earlier versions have no checksum. A run that was resumed since then has some of them
    at its beginning.
    """
    summed = False
    for line in lines:
        match = _SUMMED.fullmatch(line)
        summed = summed or match is not None
        try:
            figures = parse_object(line)
            if summed and (match is None or crc32c(match["rest"] + b"}") != int(match["sum"])):
                raise ValueError("its checksum is wrong")
            figures.pop("crc32c", None)
            if type(figures["step"]) is not int or not all(map(_is_figure, figures.values())):
                raise ValueError("it holds what is no number")
        except (ValueError, KeyError):
            yield None
        else:
            yield figures if line.endswith(b"\n") else None


def _line(figures: Figures) -> bytes:
    """With the CRC-32C of the line as it would be without it."""
    text = json.dumps(figures)
    return f'{text[:-1]}, "crc32c": {crc32c(text.encode())}}}\n'.encode()


def _is_figure(value: object) -> bool:
    """A number that can be drawn, or null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return -1e300 < value < 1e300
