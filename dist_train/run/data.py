"""The clips of a run: its store, and the split of each clip."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.checkpoint.superseded import set_aside
from dist_train.config import AugmentSettings, ClipSettings, Config
from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.original import OriginalAugment
from dist_train.data.duplicates import duplicates_across, duplicates_error, find_duplicates
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.resample import resampling_of
from dist_train.data.plan.plan import Plan, make_plan
from dist_train.data.plan.weights import Floats
from dist_train.data.splits import check_splits, choose_clips, crossed_groups
from dist_train.data.store.reader import MARKER, Store
from dist_train.data.types import GREY
from dist_train.errors import ConfigError, FileError, RunError, StoreError
from dist_train.files import read_plain, write_whole
from dist_train.places import Location, is_url, local_path
from dist_train.run.record import read_record
from dist_train.run.splits import (
    MOST_BYTES,
    SPLITS,
    read_splits,
    splits_record,
    splits_text,
    what_changed,
)

log = logging.getLogger(__name__)

RESTORE = (
    "Restore the store, or give the path of the run's own by --store-path. Other clips are "
    "predicted by 'dist-train predict --store'."
)
ACCEPT = (
    "Or choose another 'out', or accept the change by checkpoint.accept_other_order=true: training "
    "goes on at the same step of the new order."
)


@dataclass(frozen=True)
class RunData:
    """The clips of a run."""

    store: Store
    clips: pd.DataFrame
    """The store's table of the selected clips, with their split; its index is the clip number."""
    config: Config

    def numbers(self, split: str, label: int | None = None) -> np.ndarray:
        """Clip numbers of a split, ascending, int64."""
        chosen = self.clips["split"] == split
        if label is not None:
            chosen &= self.clips["label"] == label
        return self.clips.index[chosen].to_numpy(np.int64)

    @property
    def frames(self) -> np.ndarray:
        """``frames_of`` the store."""
        return frames_of(self.store, self.config.clip)

    def plan(self, weights: Floats | None = None) -> Plan:
        """The order of training.

        Args:
            weights: relative frequency of each clip of the store among the negatives, float64
                [clips]. It multiplies the manifest's weight.

        Raises:
            PlanError: the train split cannot fill the batches.
        """
        plan, clip, table = self.config.plan, self.config.clip, self.store.table
        positives, negatives = self.numbers("train", 1), self.numbers("train", 0)
        frames = self.frames
        most = clip.max_frames or frames.max()
        depths = np.minimum(frames, most)
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
        """Frames of the deepest clip of the train split, as the model gets it."""
        deepest = int(self.frames[self.numbers("train")].max())
        return min(deepest, self.config.clip.max_frames or deepest)

    def natural_rate(self) -> float:
        """Share of positives in the train split, before any balancing."""
        return len(self.numbers("train", 1)) / len(self.numbers("train"))

    def dataset(self, *, training: bool, config: Config | None = None) -> ClipDataset:
        """The store's clips in the model's shape, augmented in training.

        Args:
            config: settings to use instead of the run's.
        """
        augment = make_augment(self.config.augment, self.config.seed) if training else None
        return clip_dataset(config or self.config, self.store, augment)


def open_data(config: Config, *, training: bool = False) -> RunData:
    """Open the store, select clips, and split them.

    Args:
        training: also refuse splits that should not be trained on.

    Raises:
        StoreError: the store cannot be used.
        PlanError: the selection, or a split that training needs, lacks a class.
        ConfigError: a setting does not fit the clips.
    """
    _check_sizes(config)
    store = Store(config.store, config.cache)
    config = with_channels(config, store)
    together = config.split.duplicates == "together"
    same = find_duplicates(store) if training or together else None
    clips = choose_clips(
        store.table,
        config.select,
        config.split,
        config.seed,
        same if together else None,
        store.classes,
    )
    if training:
        given = bool((store.table["split"] != "").all())
        check_splits(clips, config.split, given=given, classes=store.classes)
        if given and os.environ.get("RANK", "0") == "0":
            _warn_of_crossed_groups(clips)
        assert same is not None
        copies = duplicates_across(clips, same[clips.index], store.classes)
        if copies is not None and config.split.duplicates != "keep":
            raise duplicates_error(copies, given=given)
        if copies is not None and os.environ.get("RANK", "0") == "0":
            log.warning("%s", copies)
    return RunData(store, clips, config)


def _warn_of_crossed_groups(clips: pd.DataFrame) -> None:
    crossed = crossed_groups(clips)
    if len(crossed):
        log.warning(
            "%d groups are in more than one split of the manifest, such as '%s' in %s: held-out "
            "metrics do not tell of new groups. split.groups=disjoint refuses this",
            len(crossed), crossed.index[0], " and ".join(sorted(crossed.iloc[0])),
        )  # fmt: skip


def _check_sizes(config: Config) -> None:
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


def open_run_data(run: Path, config: Config, *, store_path: Location | None = None) -> RunData:
    """The store and the splits that a run was trained with.

    The store is looked for at its former URL or absolute path, and then at that of the settings.

    Args:
        config: the run's settings.
        store_path: where the store is now.

    Raises:
        RunError: the record or the table of splits cannot be used.
        StoreError: the store is not there, or has changed.
    """
    record = read_record(run)
    store = Store(store_path or _find_store(record["store"]["path"], config), config.cache)
    check_channels(config, store)
    splits = read_splits(run, record["splits"])
    _check_content(store, splits, record["store"], fix=RESTORE)
    if splits is None:
        clips = choose_clips(store.table, config.select, config.split, config.seed)
        if splits_record(splits_text(store.table, clips)) != record["splits"]:
            raise RunError(
                "the run's table of splits is missing, and cannot be made again",
                where=run / SPLITS,
                fix="Restore it from a copy.",
            )
        return RunData(store, clips, config)
    split = splits["split"].to_numpy()
    return RunData(store, store.table.assign(split=split)[split != ""], config)


def _find_store(former: str, config: Config) -> Location:
    for place in (former, config.store):
        if is_url(place) or (local_path(place) / MARKER).is_file():
            return place
    raise StoreError(
        "the store that the run was trained on is not there",
        where=former,
        fix="If it was moved, give its path by --store-path.",
    )


def _check_content(
    store: Store, splits: pd.DataFrame | None, said: dict[str, Any], *, fix: str
) -> None:
    if store.content != said["content"]:
        changes = what_changed(splits, store.table, said["clips"])
        raise StoreError(
            f"this is not what the run was trained on ({changes})",
            where=store.name,
            fix=fix,
        )


def check_same_data(run: Path, data: RunData) -> None:
    """Refuse to resume a run on other clips, or by another split, than it began with.

    Raises:
        StoreError: the store has changed.
        RunError: the split has changed.
    """
    try:
        record = read_record(run)
    except RunError:
        # The checkpoints say what they were trained with.
        return
    if not record["checkpointed"]:
        return
    store = data.store
    if store.content != record["store"]["content"]:
        try:
            splits = read_splits(run, record["splits"])
        except RunError:
            splits = None
        _check_content(store, splits, record["store"], fix=f"Use the run's own store. {ACCEPT}")
    if splits_record(splits_text(store.table, data.clips)) != record["splits"]:
        raise RunError(
            "these settings give other splits than the run was trained with",
            where=run / SPLITS,
            fix=f"Use the same select, split and seed settings. {ACCEPT}",
        )


def write_splits(run: Path, data: RunData) -> dict[str, Any]:
    """Write the run's table of splits, and return what ``run.json`` says of it and of the store.
    Another table of that name is moved aside.

    Raises:
        OSError: it cannot be written.
    """
    path, store = run / SPLITS, data.store
    text = splits_text(store.table, data.clips)
    try:
        is_same = read_plain(path, most_bytes=MOST_BYTES) == text.encode()
    except FileError:
        is_same = False
    if not is_same:
        if os.path.lexists(path):
            log.warning("%s is moved to %s: it is not of this run", path, set_aside(run, path))
        write_whole(path, text)
    return {
        "store": {
            "path": store.place if isinstance(store.place, str) else str(store.place.resolve()),
            "configured": str(data.config.store),
            "fingerprint": store.fingerprint,
            "content": store.content,
            "clips": len(store.table),
        }
        | {key: store.info[key] for key in ("classes",) if key in store.info},
        "splits": splits_record(text),
    }


def make_augment(settings: AugmentSettings, seed: int) -> Augment | OriginalAugment:
    """The augmentation of clips in training."""
    return (OriginalAugment if settings.preset == "original" else Augment)(settings, seed)


def clip_dataset(
    config: Config, store: Store, augment: Augment | OriginalAugment | None
) -> ClipDataset:
    """Clips in the shape of the config's model.

    Raises:
        StoreError: clips do not say what ``clip.spacing`` or ``clip.fps`` needs.
    """
    return ClipDataset(
        store,
        size=config.clip.size,
        max_frames=config.clip.max_frames,
        augment=augment,
        on_device=config.augment.device,
        resampling=resampling_of(store, config.clip.spacing, config.clip.fps),
    )


def frames_of(store: Store, clip: ClipSettings) -> np.ndarray:
    """Frames of each clip of a store after resampling, before the cut: int64 [clips]. StoreError as
    ``clip_dataset``."""
    resampling = resampling_of(store, clip.spacing, clip.fps)
    if resampling is not None:
        return resampling.frames
    return store.table["frames"].to_numpy(np.int64)


def with_channels(config: Config, store: Store) -> Config:
    """The settings with the channels of a store; the only one, "grey", is not named.

    Raises:
        StoreError: the settings name other channels.
    """
    if config.model.channels is not None:
        check_channels(config, store)
    channels = None if store.channels == GREY else store.channels
    return config.model_copy(
        update={"model": config.model.model_copy(update={"channels": channels})}
    )


def check_channels(config: Config, store: Store) -> None:
    """Raise StoreError unless a store has the channels that the model takes."""
    own = config.model.channels or GREY
    if store.channels != own:
        raise StoreError(
            f"its channels are {', '.join(store.channels)}, and the model takes {', '.join(own)}",
            where=store.folder,
            fix="Prepare a store with the model's channels, in its order.",
        )
