"""What a run is made of: its folder, its settings, its data and its model."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dist_train.config import AugmentSettings, Config, changes, config_text, load_config
from dist_train.data.augment import Augment
from dist_train.data.augment_device import augmented_batch
from dist_train.data.augment_original import OriginalAugment
from dist_train.data.dataset import ClipDataset
from dist_train.data.duplicates import duplicates_across, find_duplicates, refuse_duplicates
from dist_train.data.files import (
    MIB,
    check_plain,
    is_sealed,
    open_lock,
    parse_object,
    read_plain,
    reason_of,
    seal_of,
    write_whole,
)
from dist_train.data.native import NativeClips
from dist_train.data.plan import Plan, make_plan
from dist_train.data.select import check_splits, choose_clips
from dist_train.data.store import MARKER, Store
from dist_train.data.weights import Floats
from dist_train.engine.superseded import set_aside
from dist_train.errors import ConfigError, FileError, RunError, StoreError
from dist_train.file_locks import go_on_unlocked
from dist_train.models.norm import fuse
from dist_train.models.registry import build_model
from dist_train.run_folder import CONFIG, RECORD
from dist_train.run_splits import (
    MOST_BYTES,
    SPLITS,
    facts_of,
    read_splits,
    splits_text,
    what_changed,
)

log = logging.getLogger(__name__)

LOCK = ".lock"
MOST_OF_RECORD, MOST_OF_CONFIG = 64 * MIB, MIB
#: Settings of a trained run that may be edited: they say how a machine works, not what comes out.
FREE = ("out:", "loader.", "augment.device:", "model.recompute:", "model.activation_memory:")
RESTORE = (
    "Restore the store, or say by --store-path where the run's own is. Other clips are predicted "
    "by 'dist-train predict --store'."
)
ACCEPT = (
    "Or choose another 'out', or accept the change by checkpoint.accept_other_order=true: training "
    "goes on at the same step of the new order."
)
VERSIONS_OF = ("torch", "accelerate", "deepspeed", "numpy", "av", "albumentations", "lmdb")


@dataclass(frozen=True)
class RunData:
    """The clips of a run. ``clips`` is the store's table of the selected clips, with their split;
    its index is the clip number."""

    store: Store
    clips: pd.DataFrame
    config: Config

    def numbers(self, split: str, label: int | None = None) -> np.ndarray:
        """Clip numbers of a split, ascending, int64."""
        chosen = self.clips["split"] == split
        if label is not None:
            chosen &= self.clips["label"] == label
        return self.clips.index[chosen].to_numpy(np.int64)

    def plan(self, weights: Floats | None = None) -> Plan:
        """The order of training.

        Args:
            weights: how often each clip of the store is drawn against others, if it is a negative:
                float64 [clips]. It multiplies the manifest's weight.

        Raises:
            PlanError: the train split cannot fill the batches.
        """
        plan, clip, table = self.config.plan, self.config.clip, self.store.table
        positives, negatives = self.numbers("train", 1), self.numbers("train", 0)
        most = clip.max_frames or table["frames"].max()
        depths = table["frames"].clip(upper=most).to_numpy(np.int64)
        own = table["weight"].to_numpy(np.float64)[negatives]
        if weights is not None:
            own = own * weights[negatives]
        banded = plan.order == "banded"
        return make_plan(
            positives,
            negatives,
            batch=plan.batch,
            ratio=plan.ratio,
            seed=self.config.seed,
            positive_depths=depths[positives] if banded else None,
            negative_depths=depths[negatives] if banded else None,
            matching=plan.negatives,
            weights=None if (own == 1.0).all() else own,
            groups=pd.factorize(table["group"])[0][negatives] if plan.balance_groups else None,
            max_voxels=plan.max_voxels,
            frame_voxels=clip.size[0] * clip.size[1],
        )

    def deepest(self) -> int:
        """Frames of the deepest clip of the train split, as it reaches the model."""
        train = self.clips.index[self.clips["split"] == "train"]
        deepest = int(self.store.table["frames"].to_numpy()[train].max())
        return min(deepest, self.config.clip.max_frames or deepest)

    def natural_rate(self) -> float:
        """Share of positives in the train split as it is, before any balancing."""
        train = self.clips[self.clips["split"] == "train"]
        return float((train["label"] == 1).mean())

    def dataset(self, *, training: bool, config: Config | None = None) -> ClipDataset:
        """``config``: settings of clips in place of the run's."""
        augment = make_augment(self.config.augment, self.config.seed) if training else None
        return clip_dataset(config or self.config, self.store, augment)


def open_data(config: Config, *, training: bool = False) -> RunData:
    """Open the store, select and split.

    Args:
        training: also refuse splits that a run should not be trained on; a finished run is judged
            on what it was trained with.

    Raises:
        StoreError: the store cannot be used.
        PlanError: the selection, or a split that is trained with, lacks a class.
        ConfigError: a setting does not fit the clips.
    """
    sizes = config.clip.size, *(stage.size for stage in config.clip.growth)
    if config.augment.rotate90 > 0 and any(height != width for height, width in sizes):
        raise ConfigError(
            "quarter turns need square clips",
            where="augment.rotate90",
            fix="Set it to 0, or make clip.size and the sizes of clip.growth square.",
        )
    if config.clip.growth and config.clip.stage_ends[-1] >= config.train.epochs:
        raise ConfigError(
            f"its stages last {config.clip.stage_ends[-1]} epochs, and the run has "
            f"{config.train.epochs}: no clip would be of full size",
            where="clip.growth",
            fix="Give it fewer epochs, or raise train.epochs.",
        )
    store = Store(config.store)
    together = config.split.duplicates == "together"
    same = find_duplicates(store) if training or together else None
    clips = choose_clips(
        store.table, config.select, config.split, config.seed, same if together else None
    )
    if training:
        given = bool((store.table["split"] != "").all())
        check_splits(clips, config.split, given=given)
        assert same is not None
        copies = duplicates_across(clips, same[clips.index])
        if copies is not None and config.split.duplicates != "keep":
            raise refuse_duplicates(copies, given=given)
        if copies is not None and os.environ.get("RANK", "0") == "0":
            log.warning("%s", copies)
    return RunData(store, clips, config)


def open_run_data(run: Path, config: Config, *, store_path: Path | None = None) -> RunData:
    """The store and the splits that a run was trained with.

    The store is looked for where it was, by its absolute path, and then at the path of the
    settings. A run of an earlier version does not say what its store held: it is split anew, with
    a warning.

    Args:
        config: the run's settings.
        store_path: where the store is now.

    Raises:
        RunError: the record or the table of splits cannot be used.
        StoreError: the store is not there, or is not as it was.
    """
    record = read_record(run)
    if "store" not in record:
        log.warning(
            "%s: the run does not say what its store held, and which clip was in which split; both "
            "are taken from the store as it is now",
            run,
        )
        moved = {} if store_path is None else {"store": store_path}
        return open_data(config.model_copy(update=moved))
    folder = _find_store(record["store"], config) if store_path is None else store_path
    store, splits = Store(folder), read_splits(run, record["splits"])
    _check_content(store, splits, record["store"], fix=RESTORE)
    if splits is None:
        data = RunData(
            store, choose_clips(store.table, config.select, config.split, config.seed), config
        )
        if facts_of(splits_text(store.table, data.clips)) != record["splits"]:
            raise RunError(
                "the run's table of splits is missing, and cannot be made again",
                where=run / SPLITS,
                fix="Restore it from a copy.",
            )
        return data
    split = splits["split"].to_numpy()
    return RunData(store, store.table.assign(split=split)[split != ""], config)


def _find_store(said: dict[str, Any], config: Config) -> Path:
    for folder in (Path(said["path"]), config.store):
        if (folder / MARKER).is_file():
            return folder
    raise StoreError(
        "the store that the run was trained on is not there",
        where=said["path"],
        fix="If it was moved, say where it is by --store-path.",
    )


def _check_content(
    store: Store, splits: pd.DataFrame | None, said: dict[str, Any], *, fix: str
) -> None:
    if store.content != said["content"]:
        raise StoreError(
            "this is not what the run was trained on "
            f"({what_changed(splits, store.table, said['clips'])})",
            where=store.folder,
            fix=fix,
        )


def check_same_data(run: Path, data: RunData) -> None:
    """Refuse to go on with a run on other clips, or by another split, than it began with.

    Raises:
        StoreError: the store is not as it was.
        RunError: the split is not as it was.
    """
    try:
        record = read_record(run)
    except RunError:
        # Its checkpoints say what they were trained with.
        return
    if "store" not in record or record.get("checkpointed") is False:
        return
    store = data.store
    if store.content != record["store"]["content"]:
        try:
            splits = read_splits(run, record["splits"])
        except RunError:
            splits = None
        _check_content(store, splits, record["store"], fix=f"Use the run's own store. {ACCEPT}")
    if facts_of(splits_text(store.table, data.clips)) != record["splits"]:
        raise RunError(
            "these settings split the clips otherwise than the run did",
            where=run / SPLITS,
            fix=f"Use the same select, split and seed settings. {ACCEPT}",
        )


def write_splits(run: Path, data: RunData) -> dict[str, Any]:
    """Write the run's table of splits, and return what ``run.json`` says of it and of the store.
    A table that says something else is moved aside.

    Raises:
        OSError: it cannot be written.
    """
    path, store = run / SPLITS, data.store
    text = splits_text(store.table, data.clips)
    is_there = os.path.lexists(path)
    try:
        is_same = is_there and read_plain(path, most_bytes=MOST_BYTES) == text.encode()
    except FileError:
        is_same = False
    if not is_same:
        if is_there:
            log.warning("%s is moved to %s: it is not of this run", path, set_aside(run, path))
        write_whole(path, text)
    return {
        "store": {
            "path": str(store.folder.resolve()),
            "configured": str(data.config.store),
            "fingerprint": store.fingerprint,
            "content": store.content,
            "clips": len(store.table),
        },
        "splits": facts_of(text),
    }


def make_augment(settings: AugmentSettings, seed: int) -> Augment | OriginalAugment:
    """What the settings make of clips in training."""
    return (OriginalAugment if settings.preset == "original" else Augment)(settings, seed)


def clip_dataset(
    config: Config, store: Store, augment: Augment | OriginalAugment | None
) -> ClipDataset:
    """Clips in the shape that the config's model takes."""
    return ClipDataset(
        store,
        size=config.clip.size,
        max_frames=config.clip.max_frames,
        augment=augment,
        on_device=config.augment.device,
    )


def make_model(config: Config) -> nn.Module:
    """The config's model in its memory layout, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    settings = config.model.model_dump(exclude={"name", "init", "activation_memory"})
    model = build_model(config.model.name, **settings)
    if config.norm.fused:
        fuse(model)
    # The stubs of nn.Module.to lack memory_format on its own.
    return model.to(memory_format=_layout(config))  # type: ignore[call-overload, no-any-return]


def as_input(volumes: Tensor | NativeClips, config: Config) -> Tensor:
    """uint8 [B, 1, D, H, W], or clips of their own sizes, to float32 [B, 1, D, H, W] of 0 to 1 in
    the run's memory layout, on the same device."""
    if isinstance(volumes, NativeClips):
        return augmented_batch(volumes, config.clip.size).to(memory_format=_layout(config))
    return volumes.to(memory_format=_layout(config)).float().div_(255)


def _layout(config: Config) -> torch.memory_format:
    return torch.channels_last_3d if config.train.channels_last else torch.contiguous_format


def model_facts(config: Config) -> dict[str, Any]:
    """What a checkpoint must agree with for its weights to mean the same: JSON types."""
    only_how = {"init", "recompute", "activation_memory", "stem_folded"}
    facts: dict[str, Any] = config.model.model_dump(mode="json", exclude=only_how)
    return facts


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


@contextmanager
def only_session(run: Path) -> Iterator[None]:
    """Make the run's folder and keep a second training out of it.

    The kernel drops the lock with its owner, however the owner ends.

    Raises:
        RunError: another training is at work in it.
        FileError: the lock's name belongs to a link, or to what is no plain file.
        MachineError: it cannot be locked, and the user has not allowed to do without.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open_lock(run / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                "another training is at work in this folder",
                where=run,
                fix="Wait for it, or choose another 'out'.",
            ) from None
        except OSError as error:
            go_on_unlocked(run, error)
        yield


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
