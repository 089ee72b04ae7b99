"""What a run says of itself: its settings (``config.yaml``) and its record (``run.json``)."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from collections.abc import Mapping
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
from dist_train.run.folder import CONFIG, RECORD

log = logging.getLogger(__name__)

MOST_OF_RECORD, MOST_OF_CONFIG = 64 * MIB, MIB
#: Settings of a trained run that may be edited: they say how a machine works, not what comes out.
FREE = (
    "out:",
    "loader.",
    "augment.device:",
    "model.recompute:",
    "model.activation_memory:",
    "train.device:",
)
VERSIONS_OF = ("torch", "accelerate", "deepspeed", "numpy", "av", "albumentations", "lmdb")


def open_run(run: Path) -> Config:
    """The resolved settings of a run.

    Raises:
        RunError: the folder is no run, or its settings are not those that it was trained with.
        ConfigError: the settings cannot be read.
    """
    if not os.path.lexists(run / CONFIG):
        raise RunError(
            "there is no run here",
            where=run,
            fix="Train one with 'dist-train train', or check the path.",
        )
    config, record = read_settings(run), open_record(run)
    if "settings" in record:
        _check_settings(run, config, record["settings"])
    elif not record:
        log.warning("%s: there is no %s to compare the settings with", run, RECORD)
    if (seen := record.get("held_out_seen", 0)) and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: its weights were trained on %d of the clips that it holds out, under another "
            "split: figures of them are too good",
            run, seen,
        )  # fmt: skip
    return config


def read_settings(run: Path) -> Config:
    """The content of ``config.yaml``.

    Raises:
        RunError: it is no plain file, or nested too deeply.
        ConfigError: it is no file of settings.
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
    """``extensions.origin`` of the model and of the loss, as far as they are from outside."""
    named = {"model.name": config.model.name, "loss.name": config.loss.name}
    return [origin(path, setting) for setting, path in named.items() if is_import_path(path)]


def warn_of_other_code(run: Path, config: Config, record: Mapping[str, Any]) -> None:
    """Warn where the model from outside has other source than in the run's last session."""
    path = config.model.name
    for known in record.get("sessions", [{}])[-1].get("code_from_outside", []):
        if is_import_path(path) and known["path"] == path:
            here = origin(path, "model.name")
            if here["sha256"] != known["sha256"]:
                log.warning(
                    "%s: the source of %s is not that which the run was trained with (version %s "
                    "then, %s now): the same weights may give other numbers",
                    run, path, known["version"], here["version"],
                )  # fmt: skip


def set_foreign_settings_aside(run: Path) -> None:
    """Move a ``config.yaml`` aside that is not, to the byte, what training writes: the user may
    have written, or commented, it by hand."""
    path = run / CONFIG
    if not os.path.lexists(path):
        return
    try:
        if read_plain(path, most_bytes=MOST_OF_CONFIG) == config_text(read_settings(run)).encode():
            return
    except (FileError, RunError, ConfigError):
        pass
    aside = set_aside(run, path)
    log.warning("%s is moved to %s: it is not as a training wrote it", path, aside)


def open_record(run: Path) -> dict[str, Any]:
    """As ``read_record``; empty where there is none, as in runs that are put together by hand."""
    return read_record(run) if os.path.lexists(run / RECORD) else {}


def _check_settings(run: Path, config: Config, settings: dict[str, Any]) -> None:
    try:
        trained = Config.model_validate(settings)
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


def read_record(run: Path) -> dict[str, Any]:
    """The content of ``run.json``, without its checksum.

    Records of earlier versions have no checksum, and no ``store``, ``splits``, ``settings`` and
    ``checkpointed``.

    Raises:
        RunError: it is missing or damaged.
    """
    path = run / RECORD
    try:
        content = parse_object(read_plain(path, most_bytes=MOST_OF_RECORD))
        if content.keys() & {"crc32c", "store"} and not is_sealed(content):
            raise ValueError("it is not as it was written")
        content.pop("crc32c", None)
        _check_record(content)
    except (FileError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the record of the run cannot be read ({reason_of(error)})",
            where=path,
            fix="Restore it from a copy, or go on with the run by --resume auto, which writes it "
            "anew.",
        ) from None
    return content


def _check_record(content: dict[str, Any]) -> None:
    rates = content["positive_rate"]
    for name in ("train_batches", "natural"):
        if not (isinstance(rates[name], float) and 0 < rates[name] < 1):
            raise ValueError(f"its positive rates are {rates}")
    sessions = content["sessions"]
    if not (isinstance(sessions, list) and all(map(_is_session, sessions))):
        raise ValueError("its sessions are no list of sessions")
    for name in ("parameters", "held_out_seen"):
        if not isinstance(content.get(name, 0), int):
            raise ValueError(f"its {name.replace('_', ' ')} is no number")
    if "store" in content:
        store = content["store"]
        texts = (store["path"], store["content"])
        numbers = (store["clips"], content["splits"]["crc32c"])
        if not (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int for number in numbers)
        ):
            raise ValueError("it does not say what the store held")


def _is_session(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("resumed_from_step"), int | None)
        and isinstance(one.get("changed", []), list)
    )


def _write_record(run: Path, record: dict[str, Any]) -> None:
    sealed = record | {"crc32c": seal_of(record)}
    write_whole(run / RECORD, json.dumps(sealed, indent=2))


def begin_session(run: Path, facts: dict[str, Any], session: dict[str, Any]) -> None:
    """Note the start, or the resumption, of training in ``run.json``; a damaged one is moved aside,
    and written anew."""
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
    """Whether the run has ever completed a checkpoint; None where its record does not say."""
    try:
        said = read_record(run).get("checkpointed")
    except RunError:
        return None
    return said if isinstance(said, bool) else None


def note_checkpoint(run: Path) -> None:
    """Note in ``run.json`` that a checkpoint was completed. From then on, a run without
    checkpoints is one that has lost them.

    Raises:
        OSError: it cannot be written.
    """
    try:
        record = read_record(run)
    except RunError as error:
        log.warning("%s", error)
        return
    if record.get("checkpointed") is not True:
        _write_record(run, record | {"checkpointed": True})


def _version(package: str) -> str | None:
    """None where it is not installed: DeepSpeed and PyAV are needed by some commands only."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
