"""The settings of a run: one frozen tree, read from YAML and ``key=value`` overrides.

The tree is the only description of a run. Functions outside ``trainer.py``, ``predict.py`` and the
command line take the section, or the plain values, that they need, never the whole tree. The text
below a setting is what ``dist-train config`` and ``docs/settings.md`` say of it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from dist_train.class_ratio import ClassRatio
from dist_train.errors import ConfigError
from dist_train.metrics import higher_is_better
from dist_train.plain_yaml import parse_yaml, read_yaml, yaml_text

COMMAND_LINE = "command line"


def _usable(path: Path) -> Path:
    text = str(path)
    if not text.isprintable() or text == ".":
        raise ValueError("a path must not be empty or hold control characters")
    return path


def _whole_size(size: object) -> object:
    # pydantic reads as far as it understands, and takes "8,5GiB" for 8 bytes.
    if isinstance(size, str) and not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*\s*", size):
        raise ValueError("it must be a number of bytes, such as 8GiB")
    return size


def _known_metric(name: str) -> str:
    try:
        higher_is_better(name)
    except ConfigError as error:
        raise ValueError(error.what) from None
    return name


# Bounds are far beyond any use, and near enough that a slip of the keyboard meets them here rather
# than as a lack of memory, an overflow, or a run that never ends.
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]
Few = Annotated[int, Field(ge=1, le=1024)]
FewOrNone = Annotated[int, Field(ge=0, le=1024)]
Epochs = Annotated[int, Field(ge=1, le=10**6)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Frames = Annotated[int, Field(ge=1, le=2**16)]
Stride = Annotated[int, Field(ge=1, le=16)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0, le=10.0)]
Bytes = Annotated[ByteSize, BeforeValidator(_whole_size), Field(ge=1, le=2**60)]
# A year and more.
Seconds = Annotated[float, Field(gt=0.0, le=4e7)]
Place = Annotated[Path, AfterValidator(_usable)]
#: Of a function or class, by name, as YAML has them.
Arguments = dict[str, JsonValue]

#: What each checkpoint is judged by, as the log names it.
HeldOutMetric = Annotated[str, AfterValidator(_known_metric)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know, and infinite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SelectSettings(Section):
    """Which clips of the store take part."""

    tier2_crowd_score: Fraction | None = None
    """Keep all clips of tier 1, and of tier 2 the positives whose crowd score is above this (the
    original recipe used 0.6); null keeps every labelled clip."""


class SplitSettings(Section):
    """Train, val and test. A split given by the manifest is used as it is; otherwise folds are
    cut."""

    folds: Annotated[int, Field(ge=3, le=1000)] = 5
    """Number of folds that the clips are cut into."""
    fold: FewOrNone = 0
    """The fold that is the test split, counted from 0; the next one is val."""
    groups: Literal["stratify", "disjoint"] = "stratify"
    """"stratify" spreads each group and class evenly over the folds (project ids); "disjoint" keeps
    every group inside one fold (patients)."""
    ungrouped: Literal["refuse", "own", "together"] = "refuse"
    """What "disjoint" does with clips that have no group: "refuse" them, take each for a group of
    its "own", or all "together" for one group."""
    duplicates: Literal["refuse", "keep", "together"] = "refuse"
    """What training does where clips of the same pixels lie in different splits: "refuse" to begin,
    "keep" them, or put them "together" into one split when folds are cut."""
    train_on_all: bool = False
    """Hold no fold out, so that nothing is judged; for the final training of settings that were
    chosen by held-out clips."""

    @model_validator(mode="after")
    def _fold_exists(self) -> SplitSettings:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist: folds are 0 to {self.folds - 1}")
        return self


class ClipStage(Section):
    """The shape of clips in a number of epochs at the beginning of training."""

    epochs: Epochs
    """Epochs that the stage lasts."""
    size: tuple[Pixels, Pixels]
    """Height and width in pixels."""
    max_frames: Frames | None = None
    """Largest number of frames; that of the section holds as well."""


class ClipSettings(Section):
    """The shape in which a clip reaches the model."""

    size: tuple[Pixels, Pixels] = (160, 160)
    """Height and width in pixels."""
    max_frames: Frames | None = None
    """Longer clips are cut to this many consecutive frames, at a random place in training and in
    the middle otherwise; null keeps all frames."""
    growth: Annotated[tuple[ClipStage, ...], Field(max_length=100)] = ()
    """Smaller clips for the first epochs of training, stage by stage (as in multigrid training, Wu
    et al. 2020); held-out clips are of full size throughout."""

    def at(self, epoch: int) -> ClipSettings:
        """What holds for training in an epoch, counted from 0."""
        for stage, end in zip(self.growth, self.stage_ends, strict=True):
            if epoch < end:
                caps = [most for most in (stage.max_frames, self.max_frames) if most is not None]
                return ClipSettings(size=stage.size, max_frames=min(caps, default=None))
        return self

    @property
    def stage_ends(self) -> list[int]:
        """The epoch, counted from 0, that each stage of ``growth`` ends before."""
        return list(accumulate(stage.epochs for stage in self.growth))


class AugmentSettings(Section):
    """Probability of each augmentation; every frame of a clip gets the same draw."""

    preset: Literal["original"] | None = None
    """"original" takes transforms, ranges and order of the original recipe, each block at 0.5
    unless its probability is given; docs/augmentation.md says what differs."""
    flip: Fraction = 0.5
    """Probability of mirroring, drawn for each of the two axes of the frame."""
    rotate90: Fraction = 0.5
    """Probability of a turn by 0 to 3 quarters, each as likely."""
    reverse: Fraction = 0.5
    """Probability of playing the clip backwards."""
    brightness: Fraction = 0.0
    """Probability of another brightness and contrast."""
    blur_noise: Fraction = 0.0
    """Probability of blur or noise."""
    distort: Fraction = 0.0
    """Probability of a smooth distortion of the frame."""
    shift_scale_rotate: Fraction = 0.0
    """Probability of a small shift, zoom and rotation."""
    device: bool = False
    """Loader workers only read clips and draw; the device resizes and augments them."""

    @model_validator(mode="before")
    @classmethod
    def _preset_gives_defaults(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "original":
            blocks = cls.model_fields.keys() - {"preset", "device"}
            return dict.fromkeys(sorted(blocks), 0.5) | given
        return given

    @model_validator(mode="after")
    def _preset_is_of_the_host(self) -> AugmentSettings:
        if self.preset is not None and self.device:
            raise ValueError(
                f"preset: {self.preset} draws noise for each frame, which is done on the host "
                "only; leave out device: true"
            )
        return self


class PlanSettings(Section):
    """The global batch, cut evenly over ranks and accumulation steps, and its order."""

    batch: Annotated[int, Field(ge=1, le=10**6)] = 32
    """Clips of a step, over all ranks."""
    ratio: ClassRatio = ClassRatio(1, 3)
    """Positives to negatives, exact in every micro-batch."""
    order: Literal["banded", "random"] = "banded"
    """"banded" puts clips of like depth into one step; "random" does not look at depth."""
    negatives: Literal["matched", "natural"] = "matched"
    """Depths of the negatives: "matched" to those of the positives, or their "natural" ones."""
    max_voxels: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """A step takes as many times `plan.batch` clips as stay within this many voxels; null takes
    `plan.batch` clips always."""
    balance_groups: bool = False
    """Draw negatives of each group equally often, whatever its size."""
    weights: Place | None = None
    """A CSV with filename,weight that says how often a negative is drawn against the others; clips
    that it does not name weigh 1. It is read anew at the start of each epoch."""

    @model_validator(mode="after")
    def _fits(self) -> PlanSettings:
        if self.batch % self.ratio.group:
            raise ValueError(
                f"batch {self.batch} is not a multiple of positives + negatives = "
                f"{self.ratio.group}"
            )
        if self.max_voxels is not None and self.order == "random":
            raise ValueError("a voxel budget (max_voxels) needs order: banded")
        if self.weights is not None and self.max_voxels is not None:
            # Where the steps begin would depend on the weights, which change as training goes on.
            raise ValueError("weights cannot be read beside a voxel budget; leave out max_voxels")
        return self


class LoaderSettings(Section):
    """The processes that read clips."""

    workers: FewOrNone = 2
    """Worker processes of each rank; 0 reads in the training process itself."""
    prefetch: Few = 4
    """Micro-batches that each worker keeps ready."""


class ModelSettings(Section):
    """The network."""

    name: str = "resnet3d-101"
    """Architecture, such as resnet3d-10, or the import path of a class, such as mylab.nets:Net
    (docs/extending.md); an unknown name is refused with all that there are."""
    args: Arguments = {}
    """Arguments of a model other than resnet3d, which has settings of its own in their place:
    `model.width` to `model.dropout`."""
    init: Place | None = None
    """Weights that a new run begins with: a run's folder (its newest snapshot, or else checkpoint),
    one of its snapshots or checkpoints, or an export. The optimizer begins afresh."""
    width: Few = 64
    """Channels of the stem; those of all stages are multiples of it."""
    stem_stride: tuple[Stride, Stride, Stride] = (1, 2, 2)
    """Stride of the first convolution over frames, height and width."""
    stem_pool: bool = True
    """Max-pool with stride 2 after the first convolution."""
    stem_folded: bool = False
    """Compute the stem by space to depth, which is the same but for rounding."""
    dropout: BelowOne = 0.0
    """Probability that a feature is dropped before the last layer, in training."""
    recompute: Literal["none", "cheap", "block", "stage"] = "none"
    """Activations that the backward pass computes again and does not keep; docs/activations.md says
    what each mode keeps and costs."""
    activation_memory: Bytes | None = None
    """Memory that activations may take; the cheapest modes that fit are chosen for
    each part of the network."""

    @model_validator(mode="after")
    def _budget_chooses(self) -> ModelSettings:
        if self.activation_memory is not None and self.recompute != "none":
            raise ValueError(
                f"activation_memory chooses what is recomputed; leave out recompute: "
                f"{self.recompute}"
            )
        return self


class LossSettings(Section):
    """The loss that training minimises."""

    name: str = "bce"
    """One of `training/losses.py`, or the import path of a function or class, such as
    mylab.losses:Focal (docs/extending.md)."""
    args: Arguments = {}
    """Arguments of the loss besides logits and labels."""


class NormSettings(Section):
    """Batch normalisation."""

    shared: bool = True
    """In training, take statistics over the clips of all processes, so that they do not depend on
    how many there are."""
    fused: bool = False
    """In training, compile it into one kernel with the shortcut's sum and the ReLU behind it; the
    same but for rounding."""
    momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Weight of a step's statistics in the running ones."""
    precise_steps: CountOrNone = 4
    """Judge held-out clips, and save snapshots, by fresh statistics over the clips of this many
    last steps; 0 takes the running ones, which lag behind weights that move."""


class OptimSettings(Section):
    """The optimizer, AdamW."""

    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 1e-3
    """Highest learning rate of the schedule."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay."""
    decay: Literal["weights", "all"] = "weights"
    """Parameters that weight decay applies to: "weights" with two or more axes, or "all", biases
    and BatchNorm's scales too."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of the two moments."""
    clip_norm: Annotated[float, Field(gt=0.0, le=1e9)] | None = 1.0
    """Largest norm of the gradient of a step; null for no limit."""
    fused: bool = False
    """One kernel for the whole update; the same but for rounding."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Validation and snapshots take an exponential moving average of the weights with this decay,
    such as 0.999, in place of the weights; null for none."""


class ScheduleSettings(Section):
    """The learning rate over the run."""

    name: Literal["cosine", "oscillating"] = "cosine"
    """After the warm-up, "cosine" is half a cosine down to the lowest rate at the last step;
    "oscillating" is whole cosine waves between the two rates."""
    warmup_epochs: Annotated[float, Field(ge=0.0, le=1e6)] = 1.0
    """Epochs of linear warm-up."""
    min_lr: Rate = 1e-6
    """Lowest learning rate after the warm-up."""
    period: Annotated[float, Field(gt=0.0, le=1e6)] = 2.0
    """Epochs of one wave of "oscillating"."""


class TrainSettings(Section):
    """Length of the run, arithmetic, and how a global batch is cut."""

    epochs: Epochs = 20
    """Length of the run; an epoch visits each positive once."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """"bf16" and "fp16" are autocast; parameters and statistics stay float32."""
    accumulate: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Micro-batches that each rank's share of a step is cut into."""
    channels_last: bool = True
    """Channels-last memory layout, which bf16 convolutions need to be fast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is a CUDA device where there is one. Where there is none it is the CPU, but not under
    a launcher, whose processes are meant for cards unless "cpu" says otherwise."""
    backend: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """"ddp", DeepSpeed's ZeRO stage 1, 2 or 3, or torch's FSDP2; docs/scaling.md says which to
    choose."""
    offload: bool = False
    """Keep ZeRO's moments, and update the weights, on the host."""
    graphs: bool = False
    """On one CUDA device, record the passes of a batch for each of its shapes, and replay them by a
    single launch (CUDA graphs); docs/numerics.md says where."""
    timeout: Seconds = 1800.0
    """Seconds after which a process that waits for others gives up."""
    hang_timeout: Annotated[
        Seconds | None, Field(validation_alias=AliasChoices("hang_timeout", "hang"))
    ] = 3600.0
    """Seconds without a finished step, or held-out batch, after which a run ends; at most three
    quarters of `train.timeout`, so that a hung process reports where it is before others give up.
    Runs of earlier versions call it "hang"."""
    max_skips: CountOrNone = 3
    """Steps of a session that may be left out because their loss or gradient was not finite,
    twice."""
    check_steps: CountOrNone = 2
    """All processes compare their weights after each of a session's first so many steps."""
    straggler_ratio: Annotated[
        float, Field(gt=1.0, le=1e6, validation_alias=AliasChoices("straggler_ratio", "slow"))
    ] = 1.5
    """Warn about a process whose own work takes this multiple of the median's. Runs of earlier
    versions call it "slow"."""
    probe: Literal["cuda", "always", "never"] = "cuda"
    """Devices on which the largest micro-batch is tried before the first step; if memory does not
    suffice, `train.accumulate` is raised for this machine."""

    @model_validator(mode="after")
    def _offload_has_zero(self) -> TrainSettings:
        if self.offload and not self.backend.startswith("zero"):
            raise ValueError("offload is offered under ZeRO only; choose backend: zero1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _graphs_fit(self) -> TrainSettings:
        if self.graphs and (self.backend != "ddp" or self.precision == "fp16"):
            raise ValueError("graphs are offered under ddp only, in bf16 or fp32")
        return self


class CheckpointSettings(Section):
    """When the run is saved for resuming, and which checkpoints are kept."""

    every_steps: Count = 500
    """Steps between two checkpoints."""
    keep_last: Count = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Keep also the checkpoints whose step is a multiple of this; null for none."""
    best: HeldOutMetric | None = None
    """Keep also the checkpoint with the best value of this metric; the run is then saved at the end
    of each epoch, too."""
    max_failures: CountOrNone = 3
    """This many failures in a row to write a checkpoint are warned of only, as long as there is an
    older one to go back to."""
    accept_other_order: bool = False
    """Resume from a checkpoint of another store, selection, split, plan or seed, at the same step
    of the new order; otherwise it is passed over."""


class SnapshotSettings(Section):
    """Which weights are kept for prediction."""

    at: Literal["minima"] | Annotated[tuple[Epochs, ...], Field(min_length=1, max_length=10**4)] = (
        "minima"
    )
    """Epochs after which weights are kept (1 is the first), or "minima": at each minimum of the
    learning rate and at the end."""


class Config(Section):
    """One training run."""

    out: Place = Path("runs/default")
    """Folder that the run is written to."""
    store: Place
    """The store that the run reads."""
    # torch's generators take 64 bits.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of all that is drawn: folds, order, augmentation, dropout and first weights."""
    select: SelectSettings = SelectSettings()
    split: SplitSettings = SplitSettings()
    clip: ClipSettings = ClipSettings()
    augment: AugmentSettings = AugmentSettings()
    plan: PlanSettings = PlanSettings()
    loader: LoaderSettings = LoaderSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    norm: NormSettings = NormSettings()
    optim: OptimSettings = OptimSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    train: TrainSettings = TrainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    snapshots: SnapshotSettings = SnapshotSettings()

    @model_validator(mode="after")
    def _graphs_run_once(self) -> Config:
        if self.train.graphs and (self.model.recompute, self.model.activation_memory) != (
            "none",
            None,
        ):
            raise ValueError(
                "what is recomputed cannot be recorded; leave out model.recompute and "
                "model.activation_memory, or train.graphs"
            )
        return self

    @model_validator(mode="after")
    def _best_is_judged(self) -> Config:
        if self.split.train_on_all and self.checkpoint.best is not None:
            raise ValueError(
                "split.train_on_all holds no clips out to choose checkpoint.best by; leave out "
                "one of the two"
            )
        return self

    @model_validator(mode="after")
    def _snapshots_fall_inside(self) -> Config:
        if self.snapshots.at != "minima":
            late = [epoch for epoch in self.snapshots.at if epoch > self.train.epochs]
            if late:
                raise ValueError(
                    f"snapshots.at names epoch {late[0]}, but train.epochs is {self.train.epochs}"
                )
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys, YAML values), and validate.

    Types are strict: ``seed=010``, ``optim.lr=true`` and ``plan.batch="32"`` are refused.

    Raises:
        ConfigError: a missing or malformed file, an unknown key (with its nearest match), a key
            that is given twice, or a value that does not fit.
    """
    known = set(_dotted_keys(Config))
    tree: dict[str, Any] = {} if path is None else _read_tree(path)
    given = _given_overrides(overrides, known)
    for key in _given_keys(tree):
        _check_known(key, known, path)
    for key, value in given.items():
        _assign(tree, key, value)

    def where(key: str) -> object:
        overridden = any(name == key or name.startswith(f"{key}.") for name in given)
        return COMMAND_LINE if path is None or overridden else path

    try:
        # By way of JSON, whose strict types are those of YAML: a list is a tuple, text a path.
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        key, what = _first_of(error)
        raise ConfigError(f"setting '{key}': {what}" if key else what, where=where(key)) from None


def last_of_each(settings: Sequence[str]) -> list[str]:
    """``key=value`` settings with the last value of each key, for a program that adds settings to a
    list: ``load_config`` refuses a key that is given twice."""
    return [f"{key}={value}" for key, value in dict(s.split("=", 1) for s in settings).items()]


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML; ``load_config`` of the file gives an equal tree."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """What ``dump_config`` writes."""
    return yaml_text(config.model_dump(mode="json"))


def changes(before: Config, now: Config) -> list[str]:
    """What differs, as "optim.lr: 0.001 before, 0.01 now", in the order of the tree."""
    pairs = zip(_leaves(before), _leaves(now), strict=True)
    return [f"{key}: {was} before, {new} now" for (key, was), (_, new) in pairs if was != new]


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _first_of(error: ValidationError) -> tuple[str, str]:
    """The first setting that does not fit, and why; of a choice of forms, why not each of them."""
    first, *others = error.errors()
    place, reasons = first["loc"], [_reason(first)]
    if len(place) > 2 and isinstance(place[2], str) and place[2] not in ClipStage.model_fields:
        # After section and setting comes the name of a form, which is pydantic's own.
        place = place[:2]
        reasons += [_reason(other) for other in others if other["loc"][:2] == place]
    key = ".".join(str(part) for part in place)
    # A section's own rule, and a key that is missing, have no value that could be told.
    told = "" if isinstance(first["input"], dict) else f", not {_shown(first['input'])}"
    return _shortened(key), "; or: ".join(reasons) + told


def _reason(error: ErrorDetails) -> str:
    match error["type"]:
        case "bool_type":
            return "Input should be true or false"
        case "tuple_type" | "named_tuple_type":
            return "Input should be a list"
        case "model_type":
            return "Input should be a section of 'key: value' settings"
        case "extra_forbidden":
            return "there is no such setting here"
        case "string_type" if not isinstance(error["input"], dict | list):
            return "Input should be text; put it in quotes if it is meant"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case _:
            return error["msg"]


def _shown(value: object) -> str:
    """A value as YAML writes it, on one line and not too long."""
    return _shortened(json.dumps(value, ensure_ascii=False, default=str))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_tree(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("must hold 'key: value' settings at its top level", where=path)
    return tree


def _given_overrides(overrides: Sequence[str], known: set[str]) -> dict[str, Any]:
    """Each override's key and value; one that gives a section gives each setting of it."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, value = _parse_override(override)
        _check_known(key, known, COMMAND_LINE)
        for name, leaf in _flat(key, value):
            _check_known(name, known, COMMAND_LINE)
            for other in given:
                if (
                    name == other
                    or f"{name}.".startswith(f"{other}.")
                    or other.startswith(f"{name}.")
                ):
                    raise ConfigError(
                        f"'{name}' is given twice", where=COMMAND_LINE, fix="Give it once."
                    )
            given[name] = leaf
    return given


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(f"{key}.{name}", inner)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(
            f"'{_shortened(override)}' is not of the form key=value", where=COMMAND_LINE
        )
    if not text.strip():
        raise ConfigError(
            f"'{_shortened(override)}' gives no value",
            where=COMMAND_LINE,
            fix="Write null for none.",
        )
    try:
        return key.strip(), parse_yaml(text)
    except ValueError as error:
        raise ConfigError(
            f"the value of '{_shortened(override)}' is not valid YAML ({error})",
            where=COMMAND_LINE,
        ) from None


def _check_known(key: str, known: set[str], where: object) -> None:
    if key not in known and not _is_argument(key):
        raise ConfigError(
            f"unknown setting '{_shortened(key)}'", where=where, fix=_nearest(key, known)
        )


def _is_argument(key: str) -> bool:
    """Whether it is one of ``Arguments``, whose names only the function or class knows."""
    section, args, name = (*key.split(".", 2), "", "")[:3]
    return (section, args) in {("model", "args"), ("loss", "args")} and bool(name)


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{dotted}': '{section}' is not a section", where=COMMAND_LINE)
        tree = inner
    tree[leaf] = value


def _dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.validation_alias, AliasChoices):
            yield from (f"{prefix}{old}" for old in field.validation_alias.choices[1:])
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _dotted_keys(kind, f"{prefix}{name}.")


def _given_keys(tree: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if "." in name:
            # Sections are nested in a file; dots are for the command line.
            yield f"{prefix}'{name}'"
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _given_keys(value, f"{prefix}{name}.")


def _nearest(key: str, known: set[str]) -> str:
    key = key[:80]  # the time to find it grows with the square of its length
    by_leaf = {name.rpartition(".")[2]: name for name in sorted(known)}
    near = difflib.get_close_matches(key, sorted(known), n=1) or [
        by_leaf[leaf]
        for leaf in difflib.get_close_matches(key.rpartition(".")[2], sorted(by_leaf), n=1)
    ]
    return (
        f"Did you mean '{near[0]}'?"
        if near
        else "Known sections: " + ", ".join(Config.model_fields)
    )
