"""Writes the metrics of each step to ``metrics.jsonl``, and to what ``track`` names."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from dist_train.checkpoint.superseded import SUPERSEDED, append_aside
from dist_train.files import crc32c, parse_object, plain_descriptor, read_plain, write_whole
from dist_train.run.folder import METRICS, TENSORBOARD
from dist_train.training.tensorboard_writer import TensorBoardWriter
from dist_train.training.tracking import Tracking, services

#: Some ten million steps.
MOST_BYTES = 2**33
_SUMMED = re.compile(rb'(?P<rest>.*), "crc32c": (?P<sum>[0-9]{1,10})\}\n?', re.DOTALL)
log = logging.getLogger(__name__)


class EventWriter:
    """Writes one line per step, with its checksum, to ``metrics.jsonl``, and the same metrics to
    ``tensorboard/``, MLflow and W&B.

    Args:
        run: the run's folder.
        settings: settings of the run, shown by TensorBoard; JSON types.
        track: what gets the metrics, besides ``metrics.jsonl``.
        after: steps done so far. Lines of later steps, from a session that was killed, are moved
            to ``superseded/metrics.jsonl``, so that every step has one line.
    """

    def __init__(
        self,
        run: Path,
        settings: Mapping[str, Any],
        *,
        after: int,
        track: Collection[str] = (TENSORBOARD,),
    ) -> None:
        self._path = run / METRICS
        if os.path.lexists(self._path):
            _set_aside_lines(run, after)
        self._descriptor = plain_descriptor(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._unwritten = bytearray()
        self._has_warned = False
        folder = run / TENSORBOARD if TENSORBOARD in track else None
        self.tensorboard = TensorBoardWriter(folder, after + 1, settings)
        self._tracking = Tracking(services(track), run, settings)

    def write(self, step: int, epoch: int, at: float, values: Mapping[str, float | None]) -> None:
        """Write the metrics of a step, counted from 1; values that are not finite become null.

        If the disk is full, lines are kept in memory until there is room, with one warning.

        Args:
            at: seconds since 1970, for display only.
        """
        finite = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        text = json.dumps({"step": step, "epoch": epoch, "time": at} | finite)
        # The checksum is that of the line without it.
        self._unwritten += f'{text[:-1]}, "crc32c": {crc32c(text.encode())}}}\n'.encode()
        try:
            self._write()
        except OSError as error:
            if not self._has_warned:
                log.warning("metrics are kept in memory until they can be written: %s", error)
            self._has_warned = True
        known = {name: value for name, value in finite.items() if value is not None}
        self.tensorboard.scalars(step, at, known)
        self._tracking.write(step, known)

    def flush(self) -> None:
        """Sync all lines to the disk. Called before each checkpoint, so that a session that resumes
        from it has the metrics of all earlier steps. OSError if the disk is full or fails."""
        self._write()
        os.fsync(self._descriptor)
        self._has_warned = False
        self.tensorboard.flush()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self.tensorboard.close()
        self._tracking.close()

    def _write(self) -> None:
        try:
            # A full disk may take a part of a line.
            while self._unwritten:
                del self._unwritten[: os.write(self._descriptor, self._unwritten)]
        except OSError as error:
            error.filename = str(self._path)
            raise


def parse_metrics(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """Parse the lines of ``metrics.jsonl``; None for a line that is not as it was written.

    Lines of earlier versions have no checksum. They can only precede those that have one.
    """
    is_summed = False
    for line in lines:
        match = _SUMMED.fullmatch(line)
        is_summed = is_summed or match is not None
        try:
            metrics = parse_object(line)
            if is_summed and (match is None or crc32c(match["rest"] + b"}") != int(match["sum"])):
                raise ValueError("its checksum is wrong")
            metrics.pop("crc32c", None)
            if type(metrics["step"]) is not int or not all(map(_can_be_drawn, metrics.values())):
                raise ValueError("a value is not a number")
        except (ValueError, KeyError):
            yield None
        else:
            yield metrics if line.endswith(b"\n") else None


def _can_be_drawn(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def _set_aside_lines(run: Path, after: int) -> None:
    """Move damaged lines and lines of steps later than ``after`` to ``superseded/``."""
    path = run / METRICS
    lines = read_plain(path, most_bytes=MOST_BYTES).splitlines(keepends=True)
    parsed = list(parse_metrics(lines))
    # A kill may tear the last line.
    damaged = parsed[:-1].count(None)
    if damaged:
        log.warning(
            "%d lines of %s are not as they were written, and are moved to %s/",
            damaged, path, SUPERSEDED,
        )  # fmt: skip
    kept = [metrics is not None and metrics["step"] <= after for metrics in parsed]
    if not all(kept):
        # First a copy: a kill in between leaves the lines in both files.
        append_aside(run, METRICS, compress(lines, map(not_, kept)))
        write_whole(path, b"".join(compress(lines, kept)))
