"""The clips of a run: its store, and the split of each clip."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.checkpoint.superseded import set_aside
from dist_train.class_metrics import higher_is_better
from dist_train.class_ratio import ClassRatio
from dist_train.config import AugmentSettings, ClipSettings, Config, TargetSettings
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
from dist_train.data.plan.depth_order import ByDepth, by_depth
from dist_train.data.plan.plan import VERSION as PLAN_VERSION
from dist_train.data.plan.plan import Plan, plan_of
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
from dist_train.data.target_labels import TargetLabels, target_labels
from dist_train.data.types import GREY, clips_of_class
from dist_train.errors import ConfigError, FileError, PlanError, RunError, StoreError
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
from dist_train.targets import NATURAL_LOSS, Target

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
    target_labels: TargetLabels

    @cached_property
    def target(self) -> Target:
        """What the run predicts, with center and scale of its settings."""
        settings = self.config.target
        return replace(
            self.target_labels.target, center=settings.center or (), scale=settings.scale or ()
        )

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels of all clips of the store as the loss takes them, float32; see ``Target``."""
        return self.labels_of(slice(None))

    def labels_of(self, clips: Ints | slice) -> np.ndarray:
        """The labels of some clips."""
        target = self.target
        values: np.ndarray = self.target_labels.values[clips].astype(np.float32)
        if target.kind == "regression":
            center, scale = (np.array(of, np.float32) for of in (target.center, target.scale))
            values = (values - center) / scale
        labels: np.ndarray = values.reshape(len(values), *target.label_shape)
        return labels

    def numbers(self, split: str, label: int | None = None) -> Ints:
        """Clip numbers of a split, ascending, int64."""
        return np.flatnonzero(self._are_in(split, label))

    def count(self, split: str, label: int | None = None) -> int:
        """Number of clips of a split."""
        return int(np.count_nonzero(self._are_in(split, label)))

    def counts(self, split: str) -> list[int]:
        """The clips of each of ``target_labels.classes`` in a split."""
        return self.target_labels.counts(self.splits == CODES[split])

    def _are_in(self, split: str, label: int | None) -> np.ndarray:
        chosen: np.ndarray = self.splits == CODES[split]
        if label is not None:
            chosen &= self.class_codes() == label
        return chosen

    def class_codes(self) -> np.ndarray:
        """Code of the class of each clip of the store, integer [clips]; below 0 without a label, or
        if a clip has not one class."""
        codes = self.target_labels.codes
        return np.full(len(self.splits), -1, np.int8) if codes is None else codes

    @property
    def classes(self) -> dict[int, str]:
        """Name of each class by its code, in ascending order."""
        return dict(enumerate(self.target.classes)) if self.target.is_coded else {}

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

    def quotas(self) -> dict[int | None, int]:
        """Clips of each class in a group of a batch, by the class's code, the anchor first. The
        code None, alone, stands for all clips of the split.

        Of two classes the positive one is the anchor. Of more it is the one with the least clips
        for its quota, as a pass over it is the shortest; of equal ones the first.

        Raises:
            PlanError: ``plan.ratio`` does not name the classes.
        """
        ratio, classes = self.config.plan.ratio, self.classes
        if ratio == "natural":
            return {None: 1}
        if not self.target.is_coded:
            raise PlanError(
                f"it is {ratio}, and clips of kind {self.target.kind} have not one class",
                where="plan.ratio",
                fix="Leave it out, or set it to natural.",
            )
        quotas: dict[int | None, int]
        if ratio == "balanced":
            quotas = dict.fromkeys(classes, 1)
        elif isinstance(ratio, tuple) and len(classes) == 2:
            quotas = {0: ratio[1], 1: ratio[0]}
        elif isinstance(ratio, dict) and ratio.keys() == set(classes.values()):
            quotas = {code: ratio[name] for code, name in classes.items()}
        else:
            raise PlanError(
                f"it is {json.dumps(ratio, ensure_ascii=False)}, and the classes are "
                f"{', '.join(classes.values())}",
                where="plan.ratio",
                fix="Give each class its number of clips, as in "
                f"{{{', '.join(f'{name}: 1' for name in classes.values())}}}.",
            )
        passes = {code: Fraction(self.count("train", code), quotas[code]) for code in quotas}
        anchor = 1 if len(quotas) == 2 else min(quotas, key=passes.__getitem__)
        return {anchor: quotas[anchor]} | quotas

    def plan(self, weights: Floats | None = None) -> Plan:
        """The order of training.

        Args:
            weights: relative frequency of each clip of the store among those of its class, float64
                [clips]. It multiplies the manifest's weight. Weights of the anchor do not count.

        Raises:
            PlanError: the ratio does not fit the classes, or the train split cannot fill the
                batches.
        """
        plan, clip, quotas = self.config.plan, self.config.clip, self.quotas()
        rules = PlanRules(
            plan.batch,
            ClassRatio(quotas.values()),
            self.config.seed,
            plan.negatives,
            plan.max_voxels,
            clip.size[0] * clip.size[1],
        )
        codes, table = list(quotas), self.store.table
        if weights is not None or len(table) < SHARED:
            anchor, *others = self._sorted_classes(codes, weights)
            return plan_of(anchor, others, rules)
        settings = plan.order, plan.balance_groups, clip.max_frames, clip.spacing, clip.fps
        sums = crc32c(self.splits), crc32c(np.ascontiguousarray(self.class_codes()))
        key = PLAN_VERSION, self.store.content, table.checksum, *sums, *codes, *settings
        arrays = shared_arrays("order", key, lambda: _as_arrays(codes, self._sorted_classes(codes)))
        anchor, *others = (_of_arrays(arrays, code, self._name_of(code)) for code in codes)
        return plan_of(anchor, others, rules)

    def _sorted_classes(
        self, codes: Sequence[int | None], weights: Floats | None = None
    ) -> list[ByDepth]:
        """The train split's clips of each class, of which the first is the anchor, sorted."""
        groups = self.store.table.codes("group") if self.config.plan.balance_groups else None
        frames = self.frames if self.config.plan.order == "banded" else None
        most, weight = self.config.clip.max_frames or MOST_FRAMES, self.store.table["weight"]
        found: list[ByDepth] = []
        for code in codes:
            clips = self.numbers("train", code)
            depths = None if frames is None else np.minimum(frames[clips], most)
            own = weight[clips]
            if code is None and not (own == 1.0).all():
                raise PlanError(
                    "natural takes every clip once a pass, and the store gives clips a weight",
                    where="plan.ratio",
                    fix="Choose another ratio, or prepare the store without weights.",
                )
            if weights is not None:
                own = own * weights[clips]
            is_weighted = bool(found) and not (own == 1.0).all()
            found.append(
                by_depth(
                    clips,
                    depths,
                    own if is_weighted else None,
                    groups[clips] if found and groups is not None else None,
                    name=self._name_of(code),
                )
            )
        return found

    def _name_of(self, code: int | None) -> str:
        return "clips" if code is None else clips_of_class(self.classes[code])

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
        labels = None if self.target_labels.in_store else self.labels
        return clip_dataset(config or self.config, self.store, augment, labels)


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
    labels = target_labels(config.target, store.table, store.classes)
    config = _with_ratio(config, labels.target)
    together = config.split.duplicates == "together"
    copies = _copies(store) if training or together else None
    splits = _choose(store, config, copies if together else None, labels)
    config = with_target(config, labels, splits)
    if training:
        given = bool(given_splits(store.table).all())
        counts = counts_by_class(splits, labels)
        check_splits(counts, config.split, given=given, classes=labels.classes)
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
    return RunData(store, splits, config, labels)


def _with_ratio(config: Config, target: Target) -> Config:
    """The settings with a ratio for a target without two classes, unless one is given."""
    is_given = "ratio" in config.plan.model_fields_set
    if is_given or (target.is_coded and len(target.classes) == 2):
        return config
    ratio = "balanced" if target.is_coded else "natural"
    plan = config.plan.model_copy(update={"ratio": ratio})
    return config.model_copy(update={"plan": plan})


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


def _choose(store: Store, config: Config, copies: Copies | None, labels: TargetLabels) -> Splits:
    """``choose_clips``, once on a node for a large store."""

    def choose() -> dict[str, Splits]:
        settings = config.select, config.split, config.seed
        return {"splits": choose_clips(store.table, *settings, copies, labels=labels)}

    if len(store.table) < SHARED or (copies is not None and copies.unread):
        return choose()["splits"]
    settings = config.select.model_dump(), config.split.model_dump(), config.seed
    content = store.content, store.table.checksum
    key: tuple[object, ...] = SPLITS_VERSION, *content, *settings, copies is None
    if not labels.in_store:
        key = *key, config.target.model_dump(exclude={"center", "scale"})
    return shared_arrays("splits", key, choose)["splits"]


def _as_arrays(codes: Sequence[int | None], classes: Sequence[ByDepth]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for code, clips in zip(codes, classes, strict=True):
        arrays[f"{code}.clips"] = clips.clips.astype(np.uint32)
        arrays |= {f"{code}.depths": clips.depths, f"{code}.starts": clips.starts}
        if clips.weights is not None:
            arrays[f"{code}.weights"] = clips.weights
    return arrays


def _of_arrays(arrays: Mapping[str, np.ndarray], code: int | None, name: str) -> ByDepth:
    clips, depths, starts = (arrays[f"{code}.{part}"] for part in ("clips", "depths", "starts"))
    return ByDepth(clips, depths, starts, arrays.get(f"{code}.weights"), name)


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
    labels = target_labels(config.target, store.table, store.classes)
    splits = read_splits(run, record["splits"])
    _check_content(store, splits, record["store"], fix=RESTORE)
    if splits is None:
        codes = _choose(store, config, None, labels)
        if splits_record(*splits_file(store.table, codes)) != record["splits"]:
            raise RunError(
                "the run's table of splits is missing, and cannot be made again",
                where=run / record["splits"].get("file", SPLITS),
                fix="Restore it from a copy.",
            )
        return RunData(store, codes, config, labels)
    return RunData(store, splits.codes, config, labels)


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


def make_augment(settings: AugmentSettings, seed: int) -> Augment | OriginalAugment:
    """The augmentation of clips in training."""
    return (OriginalAugment if settings.preset == "original" else Augment)(settings, seed)


def clip_dataset(
    config: Config,
    store: Store,
    augment: Augment | OriginalAugment | None,
    labels: np.ndarray | None = None,
) -> ClipDataset:
    """Clips in the shape of the config's model; for ``labels`` see ``ClipDataset``.

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
        labels=labels,
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


def with_target(config: Config, labels: TargetLabels, splits: Splits) -> Config:
    """The settings with what the target says of the model's outputs and the loss, and the kind,
    classes and scale that it has; of two classes of the store, ``target`` stays as it is.

    Raises:
        ConfigError: the settings name other outputs, or a metric of another kind, or a value of
            regression does not vary.
    """
    target, best = labels.target, config.checkpoint.best
    if config.model.outputs not in (1, target.outputs):
        raise ConfigError(
            f"it is {config.model.outputs}, and the target needs {target.outputs}",
            where="model.outputs",
            fix="Leave it out.",
        )
    if best is not None:
        try:
            higher_is_better(best, target.kind)
        except ConfigError as error:
            raise ConfigError(error.what, where=config.best_setting) from None
    settings = config.target
    if target.kind != "binary" or settings != TargetSettings():
        update: dict[str, Any] = {"kind": target.kind}
        if target.kind == "regression":
            update |= _scale(labels, settings, splits)
        elif target.is_coded:
            update["classes"] = target.classes
        settings = settings.model_copy(update=update)
    model = config.model.model_copy(update={"outputs": target.outputs})
    loss = config.loss
    if loss.name == "auto":
        loss = loss.model_copy(update={"name": NATURAL_LOSS[target.kind]})
    return config.model_copy(update={"target": settings, "model": model, "loss": loss})


def _scale(labels: TargetLabels, settings: TargetSettings, splits: Splits) -> dict[str, Any]:
    """Mean and standard deviation of each value in the train split, where none are given."""
    values = labels.values[splits == CODES["train"]].astype(np.float64)
    spread = values.std(axis=0)
    if settings.scale is None and (spread == 0).any():
        name = labels.target.classes[int(spread.argmin())]
        raise ConfigError(
            f"all clips of the train split have the same {name}, {values[0, spread.argmin()]:g}",
            where="target.columns",
        )
    return {
        "center": settings.center or tuple(values.mean(axis=0).tolist()),
        "scale": settings.scale or tuple(spread.tolist()),
    }


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
