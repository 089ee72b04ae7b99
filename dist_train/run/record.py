"""A run's settings (``config.yaml``) and record (``run.json``).

The record says which data, versions and sessions made the run.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_train.checkpoint.superseded import set_aside
from dist_train.config import Config, changes, config_text, load_config
from dist_train.errors import ConfigError, FileError, RunError
from dist_train.extensions import is_import_path, origin
from dist_train.files import (
    MIB,
    check_plain,
    is_sealed,
    parse_object,
    read_plain,
    reason_of,
    seal_of,
    write_whole,
)
from dist_train.models.registry import library_of
from dist_train.run.folder import CONFIG, RECORD

log = logging.getLogger(__name__)

MOST_OF_RECORD, MOST_OF_CONFIG = 64 * MIB, MIB
#: Settings that may be edited after training, because they do not change the results.
FREE = (
    "out:",
    "loader.",
    "cache.",
    "augment.device:",
    "model.recompute:",
    "model.activation_memory:",
    "train.device:",
    "track:",
)
VERSIONS_OF = ("torch", "accelerate", "deepspeed", "numpy", "av", "albumentations", "lmdb")


def open_run(run: Path) -> Config:
    """The settings of a run.

    Raises:
        RunError: the folder is no run, its record is damaged, or its settings are not those that it
            was trained with.
        ConfigError: the settings cannot be read.
    """
    if not os.path.lexists(run / CONFIG):
        raise RunError(
            "there is no run here",
            where=run,
            fix="Train one with 'dist-train train', or check the path.",
        )
    config, record = read_settings(run), read_record(run)
    try:
        trained = Config.model_validate(record["settings"])
    except ValidationError as error:
        raise RunError(
            f"its settings are not those of a run ({error.errors()[0]['msg']})",
            where=run / RECORD,
            fix="Restore it from a copy.",
        ) from None
    differing = [change for change in changes(trained, config) if not change.startswith(FREE)]
    if differing:
        raise RunError(
            f"the settings are not those that the run was trained with ({'; '.join(differing)})",
            where=run / CONFIG,
            fix="Restore them; to go on with other settings, use 'dist-train train'.",
        )
    if (seen := record.get("held_out_seen", 0)) and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: its weights were trained on %d of the clips that it holds out, under another "
            "split: their metrics are too good",
            run, seen,
        )  # fmt: skip
    return config


def read_settings(run: Path) -> Config:
    """The content of ``config.yaml``.

    Raises:
        RunError: it is not a plain file, or nested too deeply.
        ConfigError: it is not a valid file of settings.
    """
    path = run / CONFIG
    try:
        check_plain(path, most_bytes=MOST_OF_CONFIG)
        return load_config(path)
    except (FileError, ValueError) as error:
        raise RunError(
            f"the settings cannot be read ({reason_of(error)})",
            where=path,
            fix="Restore them from a copy",
        ) from None


def code_from_outside(config: Config) -> list[dict[str, str | None]]:
    """``extensions.origin`` of the model and the loss, if they are from outside, and the version of
    the library whose network the model is."""
    named = {"model.name": config.model.name, "loss.name": config.loss.name}
    found = [origin(path, setting) for setting, path in named.items() if is_import_path(path)]
    return [*found, *_library_of(config)]


def _library_of(config: Config) -> list[dict[str, str | None]]:
    library = library_of(config.model.name)
    if library is None:
        return []
    return [{"path": library, "version": _version(library), "sha256": None}]


def warn_of_other_code(run: Path, config: Config, record: Mapping[str, Any]) -> None:
    """Warn if the model from outside has another source than in the run's last session, or its
    library another version."""
    path = config.model.name
    here = [origin(path, "model.name")] if is_import_path(path) else _library_of(config)
    for known in record["sessions"][-1].get("code_from_outside", []):
        for now in here:
            # Code from outside may change without a new version.
            told = "version" if now["sha256"] is None else "sha256"
            if known["path"] == now["path"] and known[told] != now[told]:
                log.warning(
                    "%s: the source of %s has changed since the training (version %s then, %s "
                    "now): the same weights may give other numbers",
                    run, now["path"], known["version"], now["version"],
                )  # fmt: skip


def set_foreign_settings_aside(run: Path) -> None:
    """Move ``config.yaml`` aside unless it is, to the byte, what training writes: the user may have
    written or commented it by hand."""
    path = run / CONFIG
    if not os.path.lexists(path):
        return
    with suppress(FileError, RunError, ConfigError):
        if read_plain(path, most_bytes=MOST_OF_CONFIG) == config_text(read_settings(run)).encode():
            return
    aside = set_aside(run, path)
    log.warning("%s is moved to %s: it is not as a training wrote it", path, aside)


def read_record(run: Path) -> dict[str, Any]:
    """The content of ``run.json``, without its checksum.

    Raises:
        RunError: it is missing or damaged.
    """
    path = run / RECORD
    try:
        content = parse_object(read_plain(path, most_bytes=MOST_OF_RECORD))
        if not is_sealed(content):
            raise ValueError("it is not as it was written")
    except (FileError, ValueError) as error:
        raise RunError(
            f"the record of the run cannot be read ({reason_of(error)})",
            where=path,
            fix="Restore it from a copy, or go on with the run by --resume auto, which writes it "
            "anew.",
        ) from None
    del content["crc32c"]
    return content


def _write_record(run: Path, record: dict[str, Any]) -> None:
    sealed = record | {"crc32c": seal_of(record)}
    write_whole(run / RECORD, json.dumps(sealed, indent=2))


def begin_session(run: Path, facts: dict[str, Any], session: dict[str, Any]) -> None:
    """Record the start or resumption of a training in ``run.json``. A damaged file is moved aside.

    Args:
        facts: what the record says of the run from now on.
        session: what it says of this session.
    """
    record: dict[str, Any] = {}
    if os.path.lexists(run / RECORD):
        try:
            record = read_record(run)
        except RunError as error:
            log.warning("%s: %s; it is moved to %s", error.where, error.what,
                        set_aside(run, run / RECORD))  # fmt: skip
    started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= facts | {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in VERSIONS_OF},
        "host": {"name": socket.gethostname(), "machine": platform.machine()},
        "sessions": [*record.get("sessions", []), started | session],
    }
    _write_record(run, record)


def completed_checkpoint(run: Path) -> bool | None:
    """Whether the run has ever completed a checkpoint; None if its record cannot be read."""
    try:
        return bool(read_record(run)["checkpointed"])
    except RunError:
        return None


def note_checkpoint(run: Path) -> None:
    """Record that a checkpoint was completed. From then on, a run without checkpoints has lost
    them.

    Raises:
        OSError: the record cannot be written.
    """
    try:
        record = read_record(run)
    except RunError as error:
        log.warning("%s", error)
        return
    if not record["checkpointed"]:
        _write_record(run, record | {"checkpointed": True})


def _version(package: str) -> str | None:
    """None if the package is not installed: only some commands need DeepSpeed and PyAV."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None
