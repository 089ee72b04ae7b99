"""Scalars for TensorBoard, in files whose order does not hang on the clock.

TensorBoard reads the files of a folder in the order of their names, and a session that says "from
step N" makes it drop what it has read of step N and later. Its own writer names a file by the
second in which it was begun; after the clock went back, a resumed session would be read before the
one that it replaces, and steps would be there twice. So here files are numbered.

Format: TFRecord (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details)
of ``tensorboard/compat/proto/event.proto``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_train.files import crc32c

NAMED = re.compile(r"events\.out\.tfevents\.([0-9]+)")


def is_available() -> bool:
    """Whether the tensorboard package is installed, which brings the format of the records."""
    return find_spec("tensorboard") is not None


def next_file(folder: Path) -> Path:
    """A name that TensorBoard reads after those of all files there are, also of other writers."""
    taken = [int(match[1]) for path in folder.iterdir() if (match := NAMED.match(path.name))]
    return folder / f"events.out.tfevents.{max(taken, default=0) + 1:010d}"


def opening(first_step: int, time: float) -> bytes:
    """The beginning of a file: what was written of ``first_step`` and later counts no more."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    version = Event(wall_time=time, file_version="brain.Event:2")
    start = SessionLog(status=SessionLog.START)
    return _record(version) + _record(Event(wall_time=time, step=first_step, session_log=start))


def scalars(step: int, time: float, values: Mapping[str, float]) -> bytes:
    """Figures of one step.

    Args:
        time: seconds since 1970, for TensorBoard's axis of time alone.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in values.items()])
    return _record(Event(wall_time=time, step=step, summary=summary))


def _record(event: Any) -> bytes:
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _masked_sum(length) + data + _masked_sum(data)


def _masked_sum(data: bytes) -> bytes:
    crc = crc32c(data)
    rotated = (crc >> 15) | (crc << 17)
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)
