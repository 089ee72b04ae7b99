"""Snapshots: the weights that a run keeps for prediction, with what they were trained on.

A snapshot is one safetensors file. Its header holds ``facts``, JSON: ``step``; ``model`` (settings
that give the weights their meaning); ``clip`` (``size``, ``max_frames``); ``store`` (digest of the
store's content); ``data`` (settings of selection and split); and ``crc32c`` of the other facts and
the weights. Exports have the same form.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dist_train.checkpoint.format import by_step
from dist_train.checkpoint.superseded import set_aside
from dist_train.config import Config
from dist_train.errors import FileError, RunError
from dist_train.files import open_plain, parse_object, reason_of, write_whole
from dist_train.run.folder import SNAPSHOT, SNAPSHOTS
from dist_train.run.model import metadata_differences, model_metadata, target_metadata
from dist_train.system.advice import blame_machine

log = logging.getLogger(__name__)

#: Most letters shown of torch's list of weights that do not fit.
MOST_TOLD = 200


class Snapshot(NamedTuple):
    """Content of a snapshot; ``facts`` is without ``crc32c``."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]


def snapshot_metadata(config: Config, step: int, content: str) -> dict[str, Any]:
    """What the weights after ``step`` steps were trained on, as JSON types.

    Args:
        content: ``Store.content`` of the run's store.
    """
    clip = config.clip.model_dump(mode="json", exclude={"growth"})
    data = config.model_dump(mode="json", include={"seed", "select", "split"})
    # Files of earlier versions have no share.
    if data["select"]["share"] == 1:
        del data["select"]["share"]
    target = target_metadata(config)
    return {
        "step": step,
        "model": model_metadata(config),
        # Files of earlier versions, and those of the two classes of a store, have none.
        **({"target": target} if target else {}),
        # Files of earlier versions have no resampling.
        "clip": {k: v for k, v in clip.items() if k in ("size", "max_frames") or v is not None},
        "store": content,
        "data": data,
    }


def save_snapshot(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights and statistics as one safetensors file, with ``facts`` in its header.

    Args:
        weights: contiguous tensors on the host.
    """
    path.parent.mkdir(exist_ok=True)
    sealed = {**facts, "crc32c": _checksum(weights, facts)}
    # A single entry, because safetensors writes several in varying order.
    write_whole(path, save(dict(weights), metadata={"facts": json.dumps(sealed)}))


def _checksum(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
    """CRC-32C over ``facts``, and name, dtype, shape and bytes of each tensor, by name."""
    crc = google_crc32c.value(json.dumps(dict(facts), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        crc = google_crc32c.extend(crc, f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        crc = google_crc32c.extend(crc, flat.numpy())
    return int(crc)


def load_snapshot(path: Path) -> Snapshot:
    """Read a snapshot or an export, and check its checksum.

    Raises:
        RunError: the file cannot be read, is damaged, or holds a weight that is not finite.
    """
    with _opened(path) as file:
        facts, crc = _read_metadata(file)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if crc != _checksum(weights, facts):
            raise ValueError("the weights are not as they were written")
        check_finite(weights)
    return Snapshot(weights, facts)


def load_into(model: nn.Module, path: Path, config: Config, record: Mapping[str, Any]) -> None:
    """Load a snapshot of a run into the run's model.

    Args:
        config: the run's settings.
        record: the content of the run's ``run.json``.

    Raises:
        RunError: as ``load_snapshot``; or the weights are of another model, store, selection, split
            or step, or of clips of another size, and no session of the run has changed that.
    """
    snapshot = load_snapshot(path)
    _check_facts(path, snapshot.facts, config, record)
    fit_weights(model, snapshot.weights, path)


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights of the file or folder ``path`` into a model.

    Raises:
        RunError: a tensor is missing, unknown, or of another shape.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = reason_of(error)[:MOST_TOLD]
        raise RunError(f"the weights do not fit the run ({reason})", where=path) from None


def stored_checksum(path: Path) -> int:
    """The checksum in a snapshot's header; the weights are not read.

    Raises:
        RunError: the file cannot be read.
    """
    with _opened(path) as file:
        return _read_metadata(file)[1]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; turn errors in the block into ``RunError``."""
    try:
        # safetensors reports every file that it cannot open as missing; this gives the real reason.
        open_plain(path).close()
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileError, OSError, SafetensorError, ValueError, RuntimeError) as error:
        blame_machine(error, path)
        raise RunError(
            f"the snapshot cannot be used ({reason_of(error)})",
            where=path,
            fix="Delete the file, or restore it from a copy, and run the command again",
        ) from None


def _read_metadata(file: Any) -> tuple[dict[str, Any], int]:
    """The facts, and the checksum, which is removed from them."""
    facts = parse_object((file.metadata() or {}).get("facts", "{}"))
    if type(facts.get("crc32c")) is not int:
        raise ValueError("its checksum is gone")
    return facts, facts.pop("crc32c")


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for the first tensor with a value that is not finite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")


def _check_facts(
    path: Path, facts: Mapping[str, Any], config: Config, record: Mapping[str, Any]
) -> None:
    """Refuse weights that were not trained as the run was."""
    step = int(path.name.removeprefix("step-").removesuffix(SNAPSHOT))
    for name, expected in snapshot_metadata(config, step, record["store"]["content"]).items():
        changes = _differences(name, facts.get(name), expected)
        if not changes:
            continue
        what = f"the snapshot does not fit the run ({'; '.join(changes)})"
        if not _changed_on_purpose(name, config, record):
            raise RunError(what, where=path, fix="Restore config.yaml, or move the file away")
        log.warning("%s: %s, whose settings were changed when it was resumed", path, what)


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """In words, how a fact of the file differs from that of the run."""
    if name == "model":
        apart = metadata_differences(there, here)
    elif isinstance(there, dict) and isinstance(here, dict):
        parts = sorted(there.keys() | here.keys())
        apart = [(part, there.get(part), here.get(part)) for part in parts]
    else:
        apart = [("", there, here)]
    return [
        f"{name}{part and f'.{part}'}: {was!r} in the file, {now!r} in the run"
        for part, was, now in apart
        if was != now
    ]


def _changed_on_purpose(name: str, config: Config, record: Mapping[str, Any]) -> bool:
    if name in ("clip", "store", "data") and config.checkpoint.accept_other_order:
        return True
    changed = [change for session in record["sessions"] for change in session.get("changed", [])]
    return name == "clip" and any(change.startswith("clip.") for change in changed)


def set_snapshots_aside(run: Path, *, after: int, planned: Container[int] | None = None) -> None:
    """Move the snapshots of steps beyond ``after``, left by a killed session, to ``superseded/``.

    The run will pass those steps again, perhaps with other settings, and predictions average over
    all snapshots.

    Args:
        planned: if given, snapshots of other steps are moved as well.
    """
    for step, path in by_step(run / SNAPSHOTS, SNAPSHOT):
        if step > after or (planned is not None and step not in planned):
            set_aside(run, path)
