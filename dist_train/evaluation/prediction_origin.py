"""``predictions.json``: which snapshots and which store ``predictions.csv`` was made from."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_train.checkpoint.format import by_step
from dist_train.errors import FileError, RunError
from dist_train.evaluation.flips import Tta
from dist_train.files import MIB, crc32c, read_plain, write_whole
from dist_train.run.folder import PREDICTIONS, SNAPSHOT, SNAPSHOTS
from dist_train.run.snapshots import stored_checksum

log = logging.getLogger(__name__)

AGAIN = "Make the predictions again with `dist-train predict`"


class Origin(BaseModel):
    """Content of ``predictions.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    table: int
    """CRC-32C of ``predictions.csv``."""
    snapshots: dict[str, int]
    """Checksum of each snapshot by name."""
    store: str
    """``Store.content`` of the store whose clips were predicted."""
    calibration: int | None = None
    """CRC-32C of ``calibration.json``; None in files of earlier versions, and of regression."""
    tta: Tta | None = None
    """Test-time augmentation; None for none."""


def origin_file(predictions: Path) -> Path:
    return predictions.with_suffix(".json")


def write_origin(
    predictions: Path,
    table: str,
    calibration: str | None,
    snapshots: Sequence[Path],
    content: str,
    tta: Tta = "none",
) -> None:
    """Write the origin of ``table`` and ``calibration``, the texts of ``predictions`` and of the
    file beside it, if there is one.

    Call it after writing the table: then a kill in between leaves a table that is refused.

    Args:
        content: ``Store.content`` of the store whose clips were predicted.

    Raises:
        OSError: the file cannot be written.
        RunError: a snapshot can no longer be read.
    """
    origin = Origin(
        table=crc32c(table.encode()),
        snapshots={path.stem: stored_checksum(path) for path in snapshots},
        store=content,
        calibration=None if calibration is None else crc32c(calibration.encode()),
        tta=None if tta == "none" else tta,
    )
    text = origin.model_dump_json(indent=2, exclude_none=True)
    write_whole(origin_file(predictions), text + "\n")


def read_origin(predictions: Path) -> Origin | None:
    """Content of ``predictions.json``; None if there is no such file.

    Raises:
        RunError: it cannot be read.
    """
    path = origin_file(predictions)
    if not os.path.lexists(path):
        return None
    try:
        return Origin.model_validate_json(read_plain(path, most_bytes=MIB))
    except (FileError, ValidationError) as error:
        reason = "it does not say what the predictions were made from"
        if isinstance(error, FileError):
            reason = error.what
        raise RunError(f"cannot be read ({reason})", where=path, fix=AGAIN) from None


def check_origin(run: Path) -> None:
    """Refuse predictions of weights that the run no longer has. Warn if the predictions are older
    than a snapshot, or their origin is unknown.

    Raises:
        RunError: a snapshot that the predictions were made from has changed or is gone.
    """
    predictions = run / PREDICTIONS
    origin = read_origin(predictions)
    if origin is None:
        log.warning(
            "%s: the snapshots that these were made from are not known. %s", predictions, AGAIN
        )
        return
    now = {path.stem: stored_checksum(path) for _, path in by_step(run / SNAPSHOTS, SNAPSHOT)}
    then = origin.snapshots
    if other := [name for name in then if name not in now or now[name] != then[name]]:
        raise RunError(
            f"these are predictions of snapshots that the run does not have now "
            f"({', '.join(other)})",
            where=predictions,
            fix=AGAIN,
        )
    if newer := sorted(now.keys() - then.keys()):
        log.warning("%s: made before %s. %s", predictions, ", ".join(newer), AGAIN)


def check_table(predictions: Path, content: bytes) -> None:
    """Refuse a table that was edited, as far as its origin is known.

    Raises:
        RunError: the table was edited, or its origin cannot be read.
    """
    origin = read_origin(predictions)
    if origin is not None and crc32c(content) != origin.table:
        raise RunError(
            "the table is not as it was predicted",
            where=predictions,
            fix=f"{AGAIN}, or delete {origin_file(predictions).name} to evaluate it as it is",
        )
