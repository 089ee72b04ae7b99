"""What a run is made of: its folder, its settings, its data and its model."""

from __future__ import annotations

import fcntl
import json
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
from torch import Tensor, nn

from dist_train.config import Config, load_config
from dist_train.data.augment import Augment
from dist_train.data.augment_device import augmented_batch
from dist_train.data.dataset import ClipDataset
from dist_train.data.files import write_whole
from dist_train.data.native import NativeClips
from dist_train.data.plan import Plan, make_plan
from dist_train.data.select import choose_clips
from dist_train.data.store import Store
from dist_train.data.weights import Floats
from dist_train.errors import ConfigError, RunError
from dist_train.file_locks import go_on_unlocked
from dist_train.models.norm import fuse
from dist_train.models.registry import build_model
from dist_train.os_advice import blame_machine

CONFIG = "config.yaml"
LOCK = ".lock"
RECORD = "run.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
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
        augment = Augment(self.config.augment, self.config.seed) if training else None
        return clip_dataset(config or self.config, self.store, augment)


def open_data(config: Config) -> RunData:
    """Open the store, select and split.

    Raises:
        StoreError: the store cannot be used.
        PlanError: the selection lacks a class.
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
    clips = choose_clips(store.table, config.select, config.split, config.seed)
    return RunData(store, clips, config)


def clip_dataset(config: Config, store: Store, augment: Augment | None) -> ClipDataset:
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
    settings = config.model.model_dump(exclude={"name", "activation_memory"})
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
    only_how = {"recompute", "activation_memory", "stem_folded"}
    facts: dict[str, Any] = config.model.model_dump(mode="json", exclude=only_how)
    return facts


def open_run(run: Path) -> Config:
    """The resolved settings of a run.

    Raises:
        RunError: the folder is no run.
    """
    if not (run / CONFIG).is_file():
        raise RunError(
            "there is no run here",
            where=run,
            fix="Train one with 'dist-train train', or check the path.",
        )
    return load_config(run / CONFIG)


@contextmanager
def only_session(run: Path) -> Iterator[None]:
    """Make the run's folder and keep a second training out of it.

    The kernel drops the lock with its owner, however the owner ends.

    Raises:
        RunError: another training is at work in it.
        MachineError: it cannot be locked, and the user has not allowed to do without.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
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
    """The content of ``run.json``.

    Raises:
        RunError: it is missing or damaged.
    """
    path = run / RECORD
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rates = content["positive_rate"]
        if not all(0 < rates[name] < 1 for name in ("train_batches", "natural")):
            raise ValueError(f"its positive rates are {rates}")
        if not isinstance(content["sessions"], list):
            raise ValueError("its sessions are no list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        blame_machine(error, path)
        raise RunError(
            f"the record of the run cannot be read ({error})",
            where=path,
            fix="Go on with the run by --resume auto, which writes it anew.",
        ) from None
    return content


def begin_session(run: Path, facts: dict[str, Any], session: dict[str, Any]) -> None:
    """Note the start, or the resumption, of training in ``run.json``; a damaged one is replaced."""
    try:
        record = read_record(run)
    except RunError:
        record = {}
    started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= facts | {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in VERSIONS_OF},
        "host": {"name": socket.gethostname(), "machine": platform.machine()},
        "sessions": [*record.get("sessions", []), started | session],
    }
    write_whole(run / RECORD, json.dumps(record, indent=2))


def _version(package: str) -> str | None:
    """None where it is not installed: DeepSpeed and PyAV are needed by some commands only."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
