"""Snapshots: the weights that a run keeps for prediction, with what they were trained on.

A snapshot is one safetensors file. Its metadata holds ``facts``, JSON: ``step``, ``model`` (the
settings that weights only mean the same with), ``clip`` (``size``, ``max_frames``), ``store``
(digest of what the store held), ``data`` (settings of selection and split), and ``crc32c`` of the
other facts and the weights. Exports have the same form.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dist_train.checkpoint.format import by_step
from dist_train.checkpoint.superseded import set_aside
from dist_train.config import Config
from dist_train.errors import FileError, RunError
from dist_train.files import open_plain, parse_object, reason_of, write_whole
from dist_train.run.folder import SNAPSHOT, SNAPSHOTS
from dist_train.run.model import metadata_differences, model_metadata
from dist_train.system.advice import blame_machine

log = logging.getLogger(__name__)

DAMAGED = "Delete the file, or restore it from a copy, and run the command again"


class Snapshot(NamedTuple):
    """``facts`` are those without ``crc32c``, which is None in a file of an earlier version."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]
    crc32c: int | None


def snapshot_facts(config: Config, step: int, content: str | None) -> dict[str, Any]:
    """What the weights after ``step`` steps were trained on, as JSON types.

    Args:
        content: ``Store.content`` of the run's store; None where it is not known.
    """
    data = config.model_dump(mode="json", include={"seed", "select", "split"})
    return {
        "step": step,
        "model": model_metadata(config),
        "clip": {"size": list(config.clip.size), "max_frames": config.clip.max_frames},
        "store": content,
        "data": data,
    }


def save_snapshot(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Weights and statistics for prediction, as one safetensors file with ``facts`` in its header.

    Safe to call again for the same path.

    Args:
        weights: contiguous tensors on the host.
    """
    path.parent.mkdir(exist_ok=True)
    sealed = {**facts, "crc32c": sum_of_weights(weights, facts)}
    # One entry alone: the library writes several in an order that is not always the same.
    write_whole(path, save(dict(weights), metadata={"facts": json.dumps(sealed)}))


def sum_of_weights(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
    """crc32c over ``facts``, and name, dtype, shape and bytes of each tensor, by name."""
    crc = google_crc32c.value(json.dumps(dict(facts), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        crc = google_crc32c.extend(crc, f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        crc = google_crc32c.extend(crc, flat.numpy())
    return int(crc)


def load_snapshot(path: Path) -> Snapshot:
    """A snapshot or an export, whose checksum is compared.

    Raises:
        RunError: it cannot be read, is damaged, or holds a weight that is not finite.
    """
    try:
        _check_opens(path)
        with safe_open(path, framework="pt") as file:
            facts, crc = _read_metadata(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if crc is not None and crc != sum_of_weights(weights, facts):
            raise ValueError("the weights are not as they were written")
        check_finite(weights)
    except (FileError, OSError, SafetensorError, ValueError, RuntimeError) as error:
        blame_machine(error, path)
        reason = reason_of(error)
        raise RunError(f"the snapshot cannot be used ({reason})", where=path, fix=DAMAGED) from None
    if crc is None:
        log.warning(
            "%s has no checksum, as it is of an earlier version: damage would go unnoticed", path
        )
    return Snapshot(weights, facts, crc)


def load_weights(path: Path, config: Config, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a run's snapshot, checked by ``load_snapshot`` and ``check_facts``."""
    snapshot = load_snapshot(path)
    check_facts(path, snapshot.facts, config, record)
    return snapshot.weights


def sum_in_header(path: Path) -> int | None:
    """The checksum that a snapshot says it has, without reading its weights.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        _check_opens(path)
        with safe_open(path, framework="pt") as file:
            return _read_metadata(file.metadata() or {})[1]
    except (FileError, OSError, SafetensorError, ValueError) as error:
        blame_machine(error, path)
        reason = reason_of(error)
        raise RunError(f"the snapshot cannot be used ({reason})", where=path, fix=DAMAGED) from None


def _check_opens(path: Path) -> None:
    """Raise what opening a plain file raises: safetensors says of any that it cannot open that it
    is not there. Closed again, so that its own opening finds as many free descriptors."""
    open_plain(path).close()


def _read_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], int | None]:
    """The facts, and the checksum, which is popped from them."""
    if metadata.keys() != {"facts"}:
        raise ValueError("its metadata are not those of a snapshot")
    facts = parse_object(metadata["facts"])
    crc = facts.pop("crc32c", None)
    # Files of earlier versions have neither of these.
    if not isinstance(crc, int) and (crc is not None or facts.keys() & {"clip", "store", "data"}):
        raise ValueError("its checksum is gone")
    return facts, crc


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` on the first weight or statistic that is not finite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")


def check_facts(
    path: Path, facts: Mapping[str, Any], config: Config, record: Mapping[str, Any]
) -> None:
    """Refuse weights that are not of the run that they lie in. Facts that an earlier version did
    not write are not compared.

    Args:
        facts: those of the file.
        config: the run's settings.
        record: the content of ``run.json``.

    Raises:
        RunError: the weights are of another model, store, selection, split or step, or of clips of
            another size, and no session of the run has changed that.
    """
    content = record["store"]["content"] if "store" in record else facts.get("store")
    expected = snapshot_facts(config, _step_of(path, facts), content)
    differing = {
        name: [
            f"{name}{part}: {there!r} in the file, {here!r} in the run"
            for part, there, here in _differences(name, facts[name], expected[name])
        ]
        for name in ("step", "model", "clip", "store", "data")
        if name in facts
    }
    for name, changes in differing.items():
        if not changes:
            continue
        what = f"the snapshot does not fit the run ({'; '.join(changes)})"
        if not _changed_on_purpose(name, config, record):
            raise RunError(what, where=path, fix="Restore config.yaml, or move the file away")
        log.warning("%s: %s, whose settings were changed when it was resumed", path, what)


def _step_of(path: Path, facts: Mapping[str, Any]) -> Any:
    """That of its name, if it has one."""
    named = {file: step for step, file in by_step(path.parent, SNAPSHOT)}
    return named.get(path, facts.get("step"))


def _differences(name: str, there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    if name == "model":
        apart = metadata_differences(there, here)
        return [(f".{part}" if part else "", was, now) for part, was, now in apart]
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return [] if there == here else [("", there, here)]
    names = sorted(there.keys() | here.keys())
    return [
        (f".{name}", there.get(name), here.get(name))
        for name in names
        if there.get(name) != here.get(name)
    ]


def _changed_on_purpose(name: str, config: Config, record: Mapping[str, Any]) -> bool:
    if name in ("clip", "store", "data") and config.checkpoint.accept_other_order:
        return True
    changed = [change for one in record.get("sessions", []) for change in one.get("changed", [])]
    return name == "clip" and any(str(change).startswith("clip.") for change in changed)


def refuse_not_finite(outputs: np.ndarray, path: Path) -> None:
    """Raise ``RunError`` if a snapshot gives an output that is not finite."""
    bad = int((~np.isfinite(outputs)).sum())
    if bad:
        raise RunError(
            f"the snapshot gives {bad} of {outputs.size} outputs that are not finite",
            where=path,
            fix="Move the file away, or set train.precision: fp32; nothing was written",
        )


def set_snapshots_aside(run: Path, *, after: int) -> None:
    """Move the snapshots of steps beyond ``after``, which a killed session left, to
    ``superseded/``: the run will pass there again, perhaps with other settings, and predictions
    average over all there are."""
    for step, path in by_step(run / SNAPSHOTS, SNAPSHOT):
        if step > after:
            set_aside(run, path)
