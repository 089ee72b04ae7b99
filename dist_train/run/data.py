"""The clips of a run: its store, and the split of each clip."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.checkpoint.superseded import set_aside
from dist_train.class_ratio import ClassRatio
from dist_train.config import AugmentSettings, ClipSettings, Config
from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.original import OriginalAugment
from dist_train.data.duplicates import VERSION as COPIES_VERSION
from dist_train.data.duplicates import (
    Copies,
    duplicates_across,
    duplicates_error,
    find_duplicates,
)
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.resample import resampling_of
from dist_train.data.plan.depth_order import ByDepth
from dist_train.data.plan.plan import VERSION as PLAN_VERSION
from dist_train.data.plan.plan import Plan, plan_of, sorted_classes
from dist_train.data.plan.rules import PlanRules
from dist_train.data.plan.shuffle import Ints
from dist_train.data.plan.weights import Floats
from dist_train.data.splits import (
    CODES,
    NAMES,
    Splits,
    check_splits,
    choose_clips,
    counts_by_class,
    crossed_groups,
    given_splits,
)
from dist_train.data.splits import VERSION as SPLITS_VERSION
from dist_train.data.store.reader import MARKER, Store
from dist_train.data.types import GREY
from dist_train.errors import ConfigError, FileError, RunError, StoreError
from dist_train.files import crc32c, read_plain, write_whole
from dist_train.places import Location, is_url, local_path
from dist_train.run.record import read_record
from dist_train.run.shared_arrays import shared_arrays
from dist_train.run.splits import (
    MOST_BYTES,
    SPLITS,
    RunSplits,
    read_splits,
    splits_file,
    splits_record,
    what_changed,
)
from dist_train.targets import Target

log = logging.getLogger(__name__)

#: Clips from which splits and order are made once on a node, and mapped by its processes.
SHARED = 1 << 22
MOST_FRAMES = 2**31 - 1

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
    splits: Splits
    """The split of each clip of the store, see ``data.splits``; 0 takes no part."""
    config: Config

    def numbers(self, split: str, label: int | None = None) -> Ints:
        """Clip numbers of a split, ascending, int64."""
        return np.flatnonzero(self._are_in(split, label))

    def count(self, split: str, label: int | None = None) -> int:
        """Number of clips of a split."""
        return int(np.count_nonzero(self._are_in(split, label)))

    def _are_in(self, split: str, label: int | None) -> np.ndarray:
        chosen: np.ndarray = self.splits == CODES[split]
        if label is not None:
            chosen &= self.store.table["label"] == label
        return chosen

    @property
    def clips(self) -> pd.DataFrame:
        """The store's table of the selected clips; its index is the clip number."""
        return self._frame(self.splits > 0)

    @property
    def held_out(self) -> pd.DataFrame:
        """The rows of ``clips`` that are not trained on."""
        return self._frame(self.splits > CODES["train"])

    def _frame(self, chosen: np.ndarray) -> pd.DataFrame:
        clips = np.flatnonzero(chosen)
        return self.store.table.frame(clips).assign(
            split=np.array(NAMES, object)[self.splits[clips]]
        )

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
        plan, size = self.config.plan, self.config.clip.size
        rules = PlanRules(
            plan.batch,
            ClassRatio(*plan.ratio),
            self.config.seed,
            plan.negatives,
            plan.max_voxels,
            size[0] * size[1],
        )
        if weights is not None or len(self.store.table) < SHARED:
            return plan_of(*self._sorted_classes(weights), rules)
        table = self.store.table
        clip = self.config.clip
        settings = plan.order, plan.balance_groups, clip.max_frames, clip.spacing, clip.fps
        key = PLAN_VERSION, self.store.content, table.checksum, crc32c(self.splits), *settings
        arrays = shared_arrays("order", key, lambda: _as_arrays(self._sorted_classes(None)))
        return plan_of(_of_arrays(arrays, "positives"), _of_arrays(arrays, "negatives"), rules)

    def _sorted_classes(self, weights: Floats | None) -> tuple[ByDepth, ByDepth]:
        """Positives and negatives of the train split in the plan's order."""
        table, frames = self.store.table, self.frames
        positives, negatives = self.numbers("train", 1), self.numbers("train", 0)
        own = table["weight"][negatives]
        if weights is not None:
            own = own * weights[negatives]

        def depths(clips: Ints) -> Ints | None:
            if self.config.plan.order != "banded":
                return None
            cut: Ints = np.minimum(frames[clips], self.config.clip.max_frames or MOST_FRAMES)
            return cut

        return sorted_classes(
            positives,
            negatives,
            positive_depths=depths(positives),
            negative_depths=depths(negatives),
            weights=None if (own == 1.0).all() else own,
            groups=table.codes("group")[negatives] if self.config.plan.balance_groups else None,
        )

    def deepest(self) -> int:
        """Frames of the deepest clip of the train split, as the model gets it."""
        deepest = int(np.max(self.frames, where=self._are_in("train", None), initial=0))
        return min(deepest, self.config.clip.max_frames or deepest)

    def natural_rate(self) -> float:
        """Share of positives in the train split, before any balancing."""
        return self.count("train", 1) / self.count("train")

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
    copies = _copies(store) if training or together else None
    splits = _choose(store, config, copies if together else None)
    if training:
        given = bool(given_splits(store.table).all())
        counts = counts_by_class(splits, store.table["label"])
        check_splits(counts, config.split, given=given, classes=store.classes)
        if given and os.environ.get("RANK", "0") == "0":
            _warn_of_crossed_groups(store, splits)
        assert copies is not None
        chosen = copies.among(splits > 0)
        names = pd.Series(np.array(NAMES, object)[splits[chosen.clips]])
        across = duplicates_across(store.table, names, chosen, store.classes)
        if across is not None and config.split.duplicates != "keep":
            raise duplicates_error(across, given=given)
        if across is not None and os.environ.get("RANK", "0") == "0":
            log.warning("%s", across)
    return RunData(store, splits, config)


def _copies(store: Store) -> Copies:
    """``find_duplicates``, once on a node for a large store."""
    if len(store.table) < SHARED:
        return find_duplicates(store)

    def find() -> dict[str, np.ndarray]:
        found = find_duplicates(store)
        return found._asdict() | {"unread": np.array([found.unread])}

    key = COPIES_VERSION, store.content, store.table.checksum
    # Of clips that cannot be read now, a later launch may find copies.
    arrays = shared_arrays("copies", key, find, lambda made: not made["unread"].any())
    return Copies(arrays["clips"], arrays["first"], bool(arrays["unread"].any()))


def _choose(store: Store, config: Config, copies: Copies | None) -> Splits:
    """``choose_clips``, once on a node for a large store."""

    def choose() -> dict[str, Splits]:
        settings = config.select, config.split, config.seed
        return {"splits": choose_clips(store.table, *settings, copies, store.classes)}

    if len(store.table) < SHARED or (copies is not None and copies.unread):
        return choose()["splits"]
    settings = config.select.model_dump(), config.split.model_dump(), config.seed
    content = store.content, store.table.checksum
    key = SPLITS_VERSION, *content, *settings, copies is None
    return shared_arrays("splits", key, choose)["splits"]


def _as_arrays(classes: tuple[ByDepth, ByDepth]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, clips in zip(("positives", "negatives"), classes, strict=True):
        arrays[f"{name}.clips"] = clips.clips.astype(np.uint32)
        arrays |= {f"{name}.depths": clips.depths, f"{name}.starts": clips.starts}
        if clips.weights is not None:
            arrays[f"{name}.weights"] = clips.weights
    return arrays


def _of_arrays(arrays: Mapping[str, np.ndarray], name: str) -> ByDepth:
    clips, depths, starts = (arrays[f"{name}.{part}"] for part in ("clips", "depths", "starts"))
    return ByDepth(clips, depths, starts, arrays.get(f"{name}.weights"))


def _warn_of_crossed_groups(store: Store, splits: Splits) -> None:
    crossed = crossed_groups(store.table, splits)
    if crossed:
        log.warning(
            "%d groups are in more than one split of the manifest, such as '%s' in %s: held-out "
            "metrics do not tell of new groups. split.groups=disjoint refuses this",
            len(crossed), *next(iter(crossed.items())),
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
        codes = _choose(store, config, None)
        if splits_record(*splits_file(store.table, codes)) != record["splits"]:
            raise RunError(
                "the run's table of splits is missing, and cannot be made again",
                where=run / record["splits"].get("file", SPLITS),
                fix="Restore it from a copy.",
            )
        return RunData(store, codes, config)
    return RunData(store, splits.codes, config)


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
    store: Store, splits: RunSplits | None, said: dict[str, Any], *, fix: str
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
    if splits_record(*splits_file(store.table, data.splits)) != record["splits"]:
        raise RunError(
            "these settings give other splits than the run was trained with",
            where=run / record["splits"].get("file", SPLITS),
            fix=f"Use the same select, split and seed settings. {ACCEPT}",
        )


def write_splits(run: Path, data: RunData) -> dict[str, Any]:
    """Write the run's table of splits, and return what ``run.json`` says of it and of the store.
    Another table of that name is moved aside.

    Raises:
        OSError: it cannot be written.
    """
    store = data.store
    name, content = splits_file(store.table, data.splits)
    path = run / name
    try:
        is_same = read_plain(path, most_bytes=MOST_BYTES) == content
    except FileError:
        is_same = False
    if not is_same:
        if os.path.lexists(path):
            log.warning("%s is moved to %s: it is not of this run", path, set_aside(run, path))
        write_whole(path, content)
    return {
        "store": {
            "path": store.place if isinstance(store.place, str) else str(store.place.resolve()),
            "configured": str(data.config.store),
            "fingerprint": store.fingerprint,
            "content": store.content,
            "clips": len(store.table),
        }
        | {key: store.info[key] for key in ("classes",) if key in store.info}
        | {"black_and_white": black_and_white(store)},
        "splits": splits_record(name, content),
    }


def target_of(data: RunData) -> Target:
    """What the run's model predicts."""
    return Target("binary", (data.store.classes[0], data.store.classes[1]))


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
    """Frames of each clip of a store after resampling, before the cut: int32 or int64 [clips].
    StoreError as ``clip_dataset``."""
    resampling = resampling_of(store, clip.spacing, clip.fps)
    frames: np.ndarray = store.table["frames"]
    return frames if resampling is None else resampling.frames(slice(None))


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


def black_and_white(store: Store) -> dict[str, Any]:
    """What ``prepare`` was told, and found, of the values that are black and white."""
    names, settings = ("bits", "intensity", "black", "white"), store.info["settings"]
    return {name: settings[name] for name in names if settings.get(name) is not None}


def warn_of_other_values(record: Mapping[str, Any], store: Store) -> None:
    """Warn if a store's values were not mapped to pixels as those of the run's own store."""
    own, other = record.get("store", {}).get("black_and_white"), black_and_white(store)
    # Runs of earlier versions do not say it.
    if own is not None and own != other:
        log.warning(
            "%s: black and white are %s, and the model was trained with %s: prepare it with --like "
            "and the store of the training",
            store.name, other or "those of 8 bits", own or "those of 8 bits",
        )  # fmt: skip


def check_channels(config: Config, store: Store) -> None:
    """Raise StoreError unless a store has the channels that the model takes."""
    own = config.model.channels or GREY
    if store.channels != own:
        raise StoreError(
            f"its channels are {', '.join(store.channels)}, and the model takes {', '.join(own)}",
            where=store.name,
            fix="Prepare a store with the model's channels, in its order.",
        )
