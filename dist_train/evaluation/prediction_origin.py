"""Which snapshots a table of predictions was made from.

``predictions.json`` beside ``predictions.csv`` holds ``table``, the crc32c of the table;
``snapshots``, the crc32c of each snapshot by name (null for one of an earlier version); and
``store``, the digest of the store whose clips were predicted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.checkpoint.format import by_step
from dist_train.errors import FileError, RunError
from dist_train.files import MIB, crc32c, parse_object, read_plain, reason_of, write_whole
from dist_train.run.folder import PREDICTIONS, SNAPSHOT, SNAPSHOTS
from dist_train.run.snapshots import stored_checksum

log = logging.getLogger(__name__)

AGAIN = "Make the predictions again with `dist-train predict`"


def origin_file(predictions: Path) -> Path:
    return predictions.with_suffix(".json")


def write_origin(predictions: Path, table: str, snapshots: Sequence[Path], content: str) -> None:
    """Note what ``table``, the text of ``predictions``, was made from. Written after the table: a
    kill in between leaves one that is refused.

    Args:
        content: ``Store.content`` of the store whose clips were predicted.

    Raises:
        OSError: it cannot be written.
        RunError: a snapshot cannot be read any more.
    """
    origin = {
        "table": crc32c(table.encode()),
        "snapshots": {path.stem: stored_checksum(path) for path in snapshots},
        "store": content,
    }
    write_whole(origin_file(predictions), json.dumps(origin, indent=2) + "\n")


def read_origin(predictions: Path) -> dict[str, Any] | None:
    """What ``predictions.json`` says; None where there is none.

    Raises:
        RunError: it cannot be read.
    """
    path = origin_file(predictions)
    if not os.path.lexists(path):
        return None
    try:
        origin = parse_object(read_plain(path, most_bytes=MIB))
        sums = [origin["table"], *filter(lambda crc: crc is not None, origin["snapshots"].values())]
        if not all(type(crc) is int for crc in sums) or not isinstance(origin["store"], str):
            raise ValueError("it does not say what the predictions were made from")
    except (FileError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot be read ({reason_of(error)})", where=path, fix=AGAIN) from None
    return origin


def check_origin(run: Path) -> None:
    """Refuse predictions of weights that the run does not have now. Predictions that are older
    than a snapshot, or whose origin is not known, are told.

    Raises:
        RunError: a snapshot that they were made from has changed or is gone.
    """
    predictions = run / PREDICTIONS
    origin = read_origin(predictions)
    if origin is None:
        log.warning("%s: it is not known which snapshots these were made from. %s", predictions,
                    AGAIN)  # fmt: skip
        return
    now = {path.stem: stored_checksum(path) for _, path in by_step(run / SNAPSHOTS, SNAPSHOT)}
    then = origin["snapshots"]
    other = [name for name in then if name not in now or now[name] != then[name]]
    if other:
        raise RunError(
            f"these are predictions of snapshots that the run does not have now "
            f"({', '.join(other)})",
            where=predictions,
            fix=AGAIN,
        )
    if newer := sorted(now.keys() - then.keys()):
        log.warning("%s: made before %s. %s", predictions, ", ".join(newer), AGAIN)


def check_table(predictions: Path, content: bytes) -> None:
    """Refuse a table that is not the one that was predicted, where that is known.

    Raises:
        RunError: it was changed since, or its origin cannot be read.
    """
    origin = read_origin(predictions)
    if origin is not None and crc32c(content) != origin["table"]:
        raise RunError(
            "the table is not as it was predicted",
            where=predictions,
            fix=f"{AGAIN}, or delete {origin_file(predictions).name} to have it judged as it is",
        )
