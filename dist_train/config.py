"""The settings of a run: one frozen tree, read from YAML and ``key=value`` overrides.

The tree is the only description of a run. Functions outside ``trainer.py``, ``predict.py`` and the
command line take the section or the plain values that they need. ``dist-train config`` and
``docs/settings.md`` show the text below each setting.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails

from dist_train.class_metrics import higher_is_better
from dist_train.class_ratio import Clips
from dist_train.errors import ConfigError
from dist_train.places import Location, is_url, local_path
from dist_train.plain_yaml import parse_yaml, read_yaml, yaml_text

COMMAND_LINE = "command line"
# Names of earlier versions, which are still read.
RENAMED = {"train.hang": "hang_timeout", "train.slow": "straggler_ratio"}
# Settings whose value is a mapping of the user's own names; they are replaced as a whole.
MAPPINGS = ("plan.ratio", "loss.class_weights")
STORE_FIX = "Give the folder that 'dist-train prepare' wrote, or its URL, as store=FOLDER."


def _usable(path: Path) -> Path:
    text = str(path)
    if not text.isprintable() or text == ".":
        raise ValueError("a path must not be empty or hold control characters")
    return path


def _no_url(value: object) -> object:
    # pathlib would make a folder named "s3:" of it.
    if isinstance(value, str | Path) and is_url(value):
        raise ValueError("a path of this machine is needed; checkpoint.mirror takes a URL")
    return value


def _writable_url(url: str) -> str:
    if not is_url(url) or url.startswith("http") or not url.isprintable():
        raise ValueError("Input should be a URL such as s3://bucket/run, gs:// or az://")
    return url


def _store_place(value: object) -> Location:
    if not isinstance(value, str | Path):
        raise ValueError("Input should be a path or a URL")
    if not is_url(value):
        return _usable(local_path(value))
    if not str(value).isprintable():
        raise ValueError("a URL must not hold control characters")
    return value


def _whole_size(size: object) -> object:
    # pydantic would ignore the rest, and read "8,5GiB" as 8 bytes.
    if isinstance(size, str) and not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*\s*", size):
        raise ValueError("it must be a number of bytes, such as 8GiB")
    return size


def _form_of_ratio(ratio: object) -> str | None:
    if isinstance(ratio, dict | str):
        return "by name" if isinstance(ratio, dict) else "rule"
    return "two classes" if isinstance(ratio, list | tuple) and len(ratio) == 2 else None


def _known_metric(name: str) -> str:
    try:
        higher_is_better(name)
    except ConfigError as error:
        raise ValueError(error.what) from None
    return name


# Bounds are far beyond any use. They refuse typing errors that would otherwise end in a lack of
# memory, an overflow, or a run that never ends.
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
ClassWeight = Annotated[float, Field(gt=0.0, le=1e6)]
Bytes = Annotated[ByteSize, BeforeValidator(_whole_size), Field(ge=1, le=2**60)]
# Of a microscope: beyond these bounds it is in another unit.
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
# At most 15 months.
Seconds = Annotated[float, Field(gt=0.0, le=4e7)]
Place = Annotated[Path, BeforeValidator(_no_url), AfterValidator(_usable)]
# A URL is text: as a path it would lose a slash.
StorePlace = Annotated[
    Location,
    PlainValidator(_store_place),
    WithJsonSchema({"type": "string", "format": "path or URL"}),
]
Ratio = Annotated[
    Annotated[tuple[Clips, Clips], Tag("two classes")]
    | Annotated[dict[str, Clips], Tag("by name")]
    | Annotated[Literal["balanced", "natural"], Tag("rule")],
    Discriminator(
        _form_of_ratio,
        custom_error_type="ratio_form",
        custom_error_message="Input should be a list of 2, a number by class, balanced or natural",
    ),
]
#: Arguments of a function or class, by name.
Arguments = dict[str, JsonValue]
#: A metric of held-out clips, as the log names it.
HeldOutMetric = Annotated[str, AfterValidator(_known_metric)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys and infinite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SelectSettings(Section):
    """Which clips of the store take part."""

    tier2_crowd_score: Fraction | None = None
    """Take all clips of tier 1, and the positives of tier 2 whose crowd score is above this (0.6 in
    the original recipe); null takes every labelled clip."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each class's training clips that take part, drawn by `seed`; a smaller share is a
    part of a larger one. Held-out clips all take part."""


class TargetSettings(Section):
    """What the model predicts; docs/targets.md."""

    kind: Literal["auto", "binary", "multiclass", "multilabel", "ordinal", "regression"] = "auto"
    """"auto" is binary for two classes, and multiclass for more."""
    columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)] | None = None
    """Columns of metadata to take instead of the label: one with names of classes, several of 0 and
    1 for multilabel, and one or more of numbers for regression. Clips with an empty one take no
    part."""
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=10_000)] | None = None
    """Names of the classes in the order of their codes, which matters for ordinal; (negative,
    positive) for binary. Clips of other classes take no part. Null takes all, in the store's
    order."""
    center: tuple[float, ...] | None = None
    """Of each value of regression: what is subtracted before the loss; null takes the mean of the
    train split."""
    scale: tuple[Annotated[float, Field(gt=0.0)], ...] | None = None
    """Of each value of regression: what it is then divided by; null takes the standard deviation of
    the train split."""

    @model_validator(mode="after")
    def _kind_fits(self) -> TargetSettings:
        names = self.classes or ()
        if len(set(names)) < len(names):
            raise ValueError("classes holds a name twice")
        if self.kind == "auto" and self.columns is not None:
            raise ValueError("columns needs a kind, such as kind: regression")
        if self.kind == "multilabel" and len(self.columns or ()) < 2:
            raise ValueError("multilabel needs two or more columns")
        if self.kind in ("multilabel", "regression") and self.classes is not None:
            raise ValueError(f"{self.kind} has no classes; its names are those of columns")
        if self.kind not in ("multilabel", "regression") and len(self.columns or " ") > 1:
            raise ValueError(f"{self.kind} takes one column, which holds names of classes")
        if self.kind == "binary" and len(names or "01") != 2:
            raise ValueError("binary has two classes: [negative, positive]")
        if self.kind == "ordinal" and 0 < len(names) < 3:
            raise ValueError("ordinal has three classes or more; use kind: binary for two")
        for name, each in (("center", self.center), ("scale", self.scale)):
            if each is not None and self.kind != "regression":
                raise ValueError(f"{name} is of kind: regression")
            if each is not None and len(each) != len(self.columns or " "):
                raise ValueError(f"{name} needs a number for each value")
        return self


class SplitSettings(Section):
    """Train, val and test: the split of the manifest, or else folds."""

    folds: Annotated[int, Field(ge=3, le=1000)] = 5
    """Number of folds that the clips are cut into."""
    fold: FewOrNone = 0
    """The fold that is the test split, counted from 0; the next one is val."""
    groups: Literal["stratify", "disjoint"] = "stratify"
    """"stratify" spreads each group and class evenly over the folds (project ids); "disjoint" keeps
    every group inside one fold (patients)."""
    ungrouped: Literal["refuse", "own", "together"] = "refuse"
    """What "disjoint" does with clips that have no group: "refuse" them, treat each as its "own"
    group, or all "together" as one group."""
    duplicates: Literal["refuse", "keep", "together"] = "refuse"
    """What training does if clips with equal pixels lie in different splits: "refuse" to begin,
    "keep" them, or put them "together" into one split when folds are cut."""
    train_on_all: bool = False
    """Train on all folds, without validation; for a final training with settings that held-out
    clips have chosen."""

    @model_validator(mode="after")
    def _fold_exists(self) -> SplitSettings:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist: folds are 0 to {self.folds - 1}")
        return self


class ClipStage(Section):
    """The shape of clips in the first epochs of training."""

    epochs: Epochs
    """Number of epochs of the stage."""
    size: tuple[Pixels, Pixels]
    """Height and width in pixels."""
    max_frames: Frames | None = None
    """Largest number of frames; the section's limit applies, too."""


class ClipSettings(Section):
    """The shape in which a clip reaches the model."""

    size: tuple[Pixels, Pixels] = (160, 160)
    """Height and width in pixels."""
    max_frames: Frames | None = None
    """Longer clips are cut to this many consecutive frames, at a random place in training and in
    the middle otherwise; null keeps all frames."""
    spacing: tuple[Scale | None, Scale | None, Scale | None] | None = None
    """Distance of voxels over depth, height and width in um, to which clips are resampled: depth is
    interpolated linearly between frames; each frame is resized, and then cropped or padded with
    black around its middle to `size`. Null for an axis leaves it: depth as it is, and frames
    resized to `size`. The store's clips must say their spacing."""
    fps: Scale | None = None
    """Frames a second, to which clips are resampled linearly between frames; null keeps all frames.
    The store's clips must say the interval between frames."""
    growth: Annotated[tuple[ClipStage, ...], Field(max_length=100)] = ()
    """Smaller clips for the first epochs of training, stage by stage (multigrid training, Wu et
    al. 2020); held-out clips always have full size."""

    def at(self, epoch: int) -> ClipSettings:
        """The settings for training in an epoch, counted from 0."""
        for stage, end in zip(self.growth, self.stage_ends, strict=True):
            if epoch < end:
                caps = [most for most in (stage.max_frames, self.max_frames) if most is not None]
                update: dict[str, Any] = {
                    "size": stage.size,
                    "max_frames": min(caps, default=None),
                    "growth": (),
                }
                if self.spacing is not None:
                    update["spacing"] = self._coarser(self.spacing, stage.size)
                return self.model_copy(update=update)
        return self

    def _coarser(
        self, spacing: tuple[float | None, float | None, float | None], size: tuple[int, int]
    ) -> tuple[float | None, float | None, float | None]:
        """The spacing by which frames of ``size`` show as much as those of the section's size."""
        z, y, x = spacing
        if y is None or x is None:
            return spacing
        return z, y * self.size[0] / size[0], x * self.size[1] / size[1]

    @model_validator(mode="after")
    def _axes_fit(self) -> ClipSettings:
        z, y, x = self.spacing or (None, None, None)
        if (y is None) != (x is None):
            raise ValueError("spacing must have both height and width, or null for both")
        if z is not None and self.fps is not None:
            raise ValueError("depth is either space (spacing) or time (fps); leave out one of them")
        return self

    @property
    def stage_ends(self) -> list[int]:
        """First epoch, counted from 0, after each stage of ``growth``."""
        return list(accumulate(stage.epochs for stage in self.growth))


#: Settings of ``augment`` that mix clips begin so.
MIXES = ("mixup", "cutmix")


class AugmentSettings(Section):
    """Probability of each augmentation; all frames of a clip get the same draw."""

    preset: Literal["original"] | None = None
    """"original" takes transforms, ranges and order of the original recipe, each with probability
    0.5 unless given; docs/augmentation.md says what differs."""
    flip: Fraction = 0.5
    """Probability of mirroring, drawn for each of the two axes of the frame."""
    rotate90: Fraction = 0.5
    """Probability of a rotation by 0, 90, 180 or 270 degrees, with equal chances."""
    reverse: Fraction = 0.5
    """Probability of playing the clip backwards."""
    brightness: Fraction = 0.0
    """Probability of a change of brightness and contrast."""
    blur_noise: Fraction = 0.0
    """Probability of blur or noise."""
    distort: Fraction = 0.0
    """Probability of a smooth distortion of the frame."""
    shift_scale_rotate: Fraction = 0.0
    """Probability of a small shift, zoom and rotation."""
    mixup: Fraction = 0.0
    """Probability that the clips of a group are blended with each other, labels included (Zhang et
    al. 2018); a group is the least number of clips that has the ratio of the plan."""
    mixup_alpha: Annotated[float, Field(gt=0.0, le=100.0)] = 0.2
    """The shares of the two clips are drawn from Beta(alpha, alpha)."""
    cutmix: Fraction = 0.0
    """Probability that each clip of a group gets a box of another one, and its share of that label
    (Yun et al. 2019)."""
    cutmix_alpha: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """As `augment.mixup_alpha`, for the size of the box."""
    cutmix_axes: Literal["both", "space", "depth"] = "both"
    """The box is a part of the frame in all frames ("space"), all of some frames ("depth"), or a
    part of some frames ("both")."""
    device: bool = False
    """Loader workers only read clips and draw parameters; the device resizes and augments."""

    @model_validator(mode="before")
    @classmethod
    def _preset_gives_defaults(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "original":
            others = {"preset", "device"}
            blocks = {n for n in cls.model_fields.keys() - others if not n.startswith(MIXES)}
            return dict.fromkeys(sorted(blocks), 0.5) | given
        return given

    @model_validator(mode="after")
    def _one_mix_at_a_time(self) -> AugmentSettings:
        if self.mixup + self.cutmix > 1:
            raise ValueError("a group is mixed in one way: mixup + cutmix must be at most 1")
        return self

    @model_validator(mode="after")
    def _preset_is_of_the_host(self) -> AugmentSettings:
        if self.preset is not None and self.device:
            raise ValueError(
                f"preset: {self.preset} draws noise for each frame, which only the host can; "
                "leave out device: true"
            )
        return self


class PlanSettings(Section):
    """The global batch, which is cut evenly over ranks and micro-batches, and its order."""

    batch: Annotated[int, Field(ge=1, le=10**6)] = 32
    """Number of clips in a step, over all ranks."""
    ratio: Ratio = (1, 3)
    """Clips of the classes, exact in every micro-batch: positives to negatives (of two classes), or
    each class by name, as in {stalled: 1, flowing: 3}; "balanced" is 1 of each class, and "natural"
    takes every clip once a pass, whatever its class. More than two classes are "balanced" unless a
    ratio is given."""
    order: Literal["banded", "random"] = "banded"
    """"banded" puts clips of similar depth into one step; "random" ignores depth."""
    negatives: Literal["matched", "natural"] = "matched"
    """Depths of the negatives, or of all classes but the one that an epoch is a pass over:
    "matched" to that one's clips of the step, or "natural", as drawn."""
    max_voxels: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Largest number of voxels in a step: shallow clips make steps of several times `plan.batch`
    clips. With null every step has `plan.batch` clips."""
    balance_groups: bool = False
    """Draw negatives (clips of all classes but the one that an epoch is a pass over) of each group
    equally often, regardless of its size."""
    weights: Place | None = None
    """A CSV with filename,weight: how often a negative (a clip of any class but the one that an
    epoch is a pass over) is drawn relative to others of its class. Clips that it does not name have
    weight 1. It is read at the start of each epoch."""

    @model_validator(mode="after")
    def _fits(self) -> PlanSettings:
        # Unless it is given, the ratio depends on the number of classes.
        is_given = "ratio" in self.model_fields_set
        if is_given and isinstance(self.ratio, tuple) and self.batch % sum(self.ratio):
            raise ValueError(
                f"batch {self.batch} is not a multiple of positives + negatives = {sum(self.ratio)}"
            )
        if self.ratio == "natural" and (self.weights is not None or self.balance_groups):
            raise ValueError(
                "ratio: natural takes every clip once a pass, so none can be drawn more often; "
                "leave out weights and balance_groups"
            )
        if self.max_voxels is not None and self.order == "random":
            raise ValueError("a voxel budget (max_voxels) needs order: banded")
        if self.weights is not None and self.max_voxels is not None:
            # The steps of the plan would depend on the weights, which change during training.
            raise ValueError("weights cannot be read beside a voxel budget; leave out max_voxels")
        return self


class LoaderSettings(Section):
    """The processes that read clips."""

    workers: FewOrNone = 2
    """Number of worker processes of each rank; 0 reads in the training process itself."""
    prefetch: Few = 4
    """Number of micro-batches that each worker keeps ready."""


class CacheSettings(Section):
    """The parts of a remote store that were read, kept on this machine."""

    dir: Place | None = None
    """Folder that all processes of a machine share, and all stores; null takes dist_train/stores
    in the user's cache folder (XDG_CACHE_HOME, or ~/.cache), or DIST_TRAIN_CACHE/stores."""
    size: Bytes = ByteSize(100 << 30)
    """Most bytes in the folder (100GiB). Shards that were used least recently give way."""


class ModelSettings(Section):
    """The network."""

    name: str = "resnet3d-101"
    """Architecture, such as resnet3d-10 (an unknown name is refused with a list of all), or the
    import path of a class, such as mylab.nets:Net (docs/extending.md)."""
    channels: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] | None = None
    """Names of the channels of clips, in order. A run takes those of its store, and keeps them;
    null is one, "grey"."""
    outputs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Numbers that the model gives for a clip. A run takes those of its target, and keeps them."""
    args: Arguments = {}
    """Arguments of a model other than resnet3d, whose settings are `model.width` to
    `model.dropout`."""
    init: Place | None = None
    """Weights to begin a new run with: a run's folder (its newest snapshot, or else checkpoint),
    one of its snapshots or checkpoints, an export, or a file of another library's weights
    (docs/weights.md). The optimizer's state is new."""
    init_layout: str = "auto"
    """Whose weights the file of `model.init` holds: "auto" tells it from names and shapes;
    docs/weights.md lists the layouts."""
    width: Few = 64
    """Channels of the stem; the stages have multiples of it."""
    stem_stride: tuple[Stride, Stride, Stride] = (1, 2, 2)
    """Stride of the first convolution over frames, height and width."""
    stem_pool: bool = True
    """Max-pool with stride 2 after the first convolution."""
    stem_border: bool = False
    """The first convolution also sees a channel of ones, which ends where the clip does; weights of
    networks that normalised their input need it to give the same logits (docs/weights.md)."""
    stem_folded: bool = False
    """Compute the stem by space to depth; the result differs by rounding only."""
    dropout: BelowOne = 0.0
    """Probability that a feature is dropped before the last layer, in training."""
    recompute: Literal["none", "cheap", "block", "stage"] = "none"
    """Activations that are not kept, but computed again in the backward pass; docs/activations.md
    says what each mode keeps and costs."""
    activation_memory: Bytes | None = None
    """Memory for activations; each part of the network gets the cheapest mode of recomputing with
    which all fit."""

    @property
    def in_channels(self) -> int:
        """Number of channels of clips."""
        return 1 if self.channels is None else len(self.channels)

    @model_validator(mode="after")
    def _layout_is_of_a_file(self) -> ModelSettings:
        if self.init_layout != "auto" and self.init is None:
            raise ValueError("init_layout says what the file of init is; give init too")
        return self

    @model_validator(mode="after")
    def _budget_chooses(self) -> ModelSettings:
        if self.activation_memory is not None and self.recompute != "none":
            raise ValueError(
                f"activation_memory chooses what is recomputed; leave out recompute: "
                f"{self.recompute}"
            )
        return self


class DistillSettings(Section):
    """Learning from a trained net as well (Hinton, Vinyals and Dean 2015); docs/losses.md."""

    teacher: Place | None = None
    """A run's folder (all its snapshots), one snapshot, or an export: the mean of its probabilities
    of each training clip is a second label; null for none."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Weight of the teacher in the loss; the labels have the rest."""
    temperature: Annotated[float, Field(ge=1.0, le=1e3)] = 2.0
    """What logits of both nets are divided by for the teacher's part."""


class LossSettings(Section):
    """The loss that training minimises; docs/losses.md says what each part does, and when."""

    name: str = "auto"
    """"auto" is "bce" for binary and multilabel, "ce" for multiclass, "ordinal" for ordinal and
    "huber" for regression; one of these; "focal", "mse" or "mae"; or the import path of a function
    or class, such as mylab.losses:Focal (docs/extending.md)."""
    args: Arguments = {}
    """Arguments of the loss, besides logits and labels: gamma (2) of focal, delta (1) of huber."""
    class_weights: Literal["balanced"] | dict[str, ClassWeight] | None = None
    """Weight of a clip by its class, such as {stalled: 3}, others 1; "balanced" undoes the ratio of
    the plan. Their mean over a batch is scaled to 1."""
    smoothing: BelowOne = 0.0
    """Share of each label that is spread evenly over the classes."""
    logit_adjustment: Literal["natural", "balanced"] | None = None
    """Let logits hold for another mix of classes than that of the batches: that of the train split
    ("natural"), or equal shares ("balanced")."""
    soft_labels: Literal["crowd_score"] | None = None
    """Train on a clip's crowd score, where it is known, in place of its class; two classes only."""
    sureness: Literal["none", "margin"] = "none"
    """Weight of a clip by how sure its crowd score s is: "margin" is |2s - 1|, scaled to a mean of
    1 over a batch; a clip without one is sure."""
    distill: DistillSettings = DistillSettings()


class NormSettings(Section):
    """Batch normalisation."""

    shared: bool = True
    """In training, take statistics over the clips of all processes, so that they do not depend on
    the number of processes."""
    fused: bool = False
    """In training, compile normalisation, the shortcut's sum and the ReLU into one kernel; the
    result differs by rounding only."""
    momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Weight of a step's statistics in the running ones."""
    precise_steps: CountOrNone = 4
    """Validation and snapshots take fresh statistics over the clips of this many last steps; 0
    takes the running statistics, which lag behind fast weights."""


class OptimSettings(Section):
    """The optimizer."""

    name: Literal["adamw", "sgd", "lamb"] = "adamw"
    """"adamw"; "sgd" with Nesterov momentum; or "lamb" for batches of thousands of clips, under
    backend: ddp or fsdp2. docs/numerics.md has the rules."""
    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 1e-3
    """Highest learning rate of the schedule."""
    weight_decay: Rate = 0.05
    """Weight decay: decoupled, but for SGD, which adds it to the gradient, and has 1e-4 unless
    given."""
    decay: Literal["weights", "all"] = "weights"
    """Parameters with weight decay: "weights" with two or more axes, or "all", including biases and
    BatchNorm's scales."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of the two moments of AdamW and LAMB."""
    momentum: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Nesterov momentum of SGD."""
    clip_norm: Annotated[float, Field(gt=0.0, le=1e9)] | None = 1.0
    """Largest norm of the gradient of a step; null for no limit."""
    fused: bool = False
    """One kernel for the whole update of AdamW or SGD; the result differs by rounding only."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay, such as 0.999, of an exponential moving average of the weights, which validation and
    snapshots use in place of the weights; null for none."""

    @model_validator(mode="after")
    def _optimizer_has(self) -> OptimSettings:
        if self.name == "sgd" and "weight_decay" not in self.model_fields_set:
            # A validator of the raw values would not know that JSON has no tuples.
            self.__dict__["weight_decay"] = 1e-4
        lacking = {"adamw": ("momentum",), "sgd": ("betas",), "lamb": ("momentum", "fused")}
        for name in lacking[self.name]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"name: {self.name} has no {name}; leave it out")
        return self


class FinetuneSettings(Section):
    """How the weights of `model.init` are trained on; docs/weights.md."""

    freeze: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """What is not trained: parts of the network (stem, layer1 to layer4 and head of resnet3d),
    patterns of names of parameters, such as blocks.0.*, or "all but head"."""
    freeze_norm: Literal["parts", "all", "none"] = "parts"
    """BatchNorm layers that normalise by the statistics that they came with, and keep them: those
    of frozen "parts", "all", or "none"."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate from each part to the one before it: the head has the whole
    rate, the part before it this share, and so on to the stem."""
    head_lr: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    """Highest learning rate of the head; null takes `optim.lr`."""


class ScheduleSettings(Section):
    """The learning rate over the run."""

    name: Literal["cosine", "oscillating"] = "cosine"
    """After the warm-up, "cosine" falls to the lowest rate at the last step; "oscillating" repeats
    whole cosine waves between the two rates."""
    warmup_epochs: Annotated[float, Field(ge=0.0, le=1e6)] = 1.0
    """Epochs of linear warm-up."""
    min_lr: Rate = 1e-6
    """Lowest learning rate after the warm-up."""
    period: Annotated[float, Field(gt=0.0, le=1e6)] = 2.0
    """Epochs of one wave of "oscillating"."""


class TrainSettings(Section):
    """Length of the run, arithmetic, and processes."""

    epochs: Epochs = 20
    """Number of epochs; an epoch visits each positive once, or each clip of the class that
    docs/sampling.md calls the anchor."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """"bf16" and "fp16" use autocast; parameters and statistics stay float32."""
    accumulate: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Number of micro-batches that each rank's part of a step is cut into."""
    channels_last: bool = True
    """Channels-last memory layout, which bf16 convolutions need to be fast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a CUDA device if there is one, else the CPU. Under a launcher, whose processes
    are meant for GPUs, the CPU needs "cpu"."""
    backend: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """"ddp", DeepSpeed's ZeRO stage 1, 2 or 3, or torch's FSDP2; docs/scaling.md says which to
    choose."""
    offload: bool = False
    """Keep ZeRO's moments, and update the weights, on the host."""
    graphs: bool = False
    """Record the passes of each shape of batch on a CUDA device, and replay them with one launch
    (CUDA graphs); docs/numerics.md says when."""
    timeout: Seconds = 1800.0
    """Seconds after which a process stops waiting for others."""
    hang_timeout: Seconds | None = 3600.0
    """Seconds without a finished step or validation batch after which a run ends. At most three
    quarters of `train.timeout` count, so that a hung process reports its place before others stop
    waiting. Earlier versions call it "hang"."""
    max_skips: CountOrNone = 3
    """Number of steps of a session that may be skipped: their loss or gradient was not finite, and
    again not on a second try."""
    check_steps: CountOrNone = 2
    """Number of first steps of a session after which all processes compare their weights."""
    straggler_ratio: Annotated[float, Field(gt=1.0, le=1e6)] = 1.5
    """Warn about a process whose own work takes this multiple of the median. Earlier versions call
    it "slow"."""
    noise_scale: bool = False
    """Log the gradient noise scale, in clips: a batch much smaller than it can be doubled at little
    loss. Needs `train.accumulate` of 2 or more, and backend: ddp."""
    probe: Literal["cuda", "always", "never"] = "cuda"
    """Devices on which the largest micro-batch is tried before the first step. If memory does not
    suffice, `train.accumulate` is raised for this machine."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {RENAMED.get(f"train.{name}", name): value for name, value in given.items()}

    @model_validator(mode="after")
    def _backend_can(self) -> TrainSettings:
        if self.offload and not self.backend.startswith("zero"):
            raise ValueError("offload works under ZeRO only; choose backend: zero1, zero2 or zero3")
        if self.graphs and (self.backend != "ddp" or self.precision == "fp16"):
            raise ValueError("graphs work under backend: ddp only, in bf16 or fp32")
        if self.noise_scale and (self.backend != "ddp" or self.precision == "fp16"):
            raise ValueError("noise_scale works under backend: ddp only, in bf16 or fp32")
        if self.noise_scale and self.accumulate == 1:
            raise ValueError(
                "noise_scale compares micro-batches with steps; set accumulate to 2 or more"
            )
        return self


class StopSettings(Section):
    """An end before the last epoch, when validation no longer improves."""

    metric: HeldOutMetric | None = None
    """Metric that must improve, such as val/mcc@0.5; null trains all epochs. The checkpoint with
    its best value is kept (`checkpoint.best`), and a run that stops saves the weights of that
    checkpoint as its last snapshot, in place of those at its end."""
    patience: Epochs = 5
    """Number of epochs without an improvement after which the run stops."""
    min_delta: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """An epoch improves the metric if it is better than the best one by more than this."""


class CheckpointSettings(Section):
    """When the run is saved, and which checkpoints are kept."""

    every_steps: Count = 500
    """Steps between two checkpoints."""
    keep_last: Count = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Also keep checkpoints whose step is a multiple of this; null for none."""
    best: HeldOutMetric | None = None
    """Also keep the checkpoint with the best value of this metric, such as val/mcc@0.5; the run is
    then also saved at the end of each epoch."""
    max_failures: CountOrNone = 3
    """Number of failed writes in a row that only cause a warning, while an older checkpoint
    exists."""
    mirror: Annotated[str, AfterValidator(_writable_url)] | None = None
    """URL such as s3://bucket/run below which the run is copied with each checkpoint, beside the
    training. --resume auto on another machine goes on from there."""
    accept_other_order: bool = False
    """Resume from a checkpoint of another store, selection, split, plan or seed, at the same step
    of the new order; otherwise it is ignored."""


class SnapshotSettings(Section):
    """Which weights are saved for prediction."""

    at: Literal["minima"] | Annotated[tuple[Epochs, ...], Field(min_length=1, max_length=10**4)] = (
        "minima"
    )
    """Epochs (1 is the first) after which weights are saved, or "minima": at each minimum of the
    learning rate and at the end."""


class Config(Section):
    """One training run."""

    out: Place = Path("runs/default")
    """Folder that the run is written to."""
    store: StorePlace
    """The store that the run reads: its folder, or its URL (s3, gs, az, http, https)."""
    # torch's generators take 64 bits.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random: folds, order, augmentation, dropout and first weights."""
    target: TargetSettings = TargetSettings()
    select: SelectSettings = SelectSettings()
    split: SplitSettings = SplitSettings()
    clip: ClipSettings = ClipSettings()
    augment: AugmentSettings = AugmentSettings()
    plan: PlanSettings = PlanSettings()
    loader: LoaderSettings = LoaderSettings()
    cache: CacheSettings = CacheSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    norm: NormSettings = NormSettings()
    optim: OptimSettings = OptimSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    train: TrainSettings = TrainSettings()
    stop: StopSettings = StopSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    track: Annotated[
        tuple[Literal["tensorboard", "jsonl", "mlflow", "wandb"], ...], Field(max_length=4)
    ] = ("tensorboard", "jsonl")
    """What shows the metrics: "tensorboard", "mlflow" and "wandb" (docs/tracking.md). "jsonl" is
    metrics.jsonl, which is always written."""

    @property
    def best_setting(self) -> str:
        """The setting that names the metric of the best checkpoint."""
        return "checkpoint.best" if self.stop.metric is None else "stop.metric"

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.checkpoint.best is None and self.stop.metric is not None:
            kept = self.checkpoint.model_copy(update={"best": self.stop.metric})
            self.__dict__["checkpoint"] = kept
        if self.stop.metric not in (None, self.checkpoint.best):
            raise ValueError(
                f"checkpoint.best is {self.checkpoint.best}, and stop.metric {self.stop.metric}; "
                "give one metric for both"
            )
        recomputes = self.model.recompute != "none" or self.model.activation_memory is not None
        if self.train.graphs and recomputes:
            raise ValueError(
                "CUDA graphs cannot recompute activations; leave out model.recompute and "
                "model.activation_memory, or train.graphs"
            )
        keeps = self.finetune.freeze or self.finetune.freeze_norm == "all"
        if keeps and self.model.init is None:
            raise ValueError(
                "finetune.freeze and freeze_norm keep what model.init gives, and there is none; "
                "give model.init, or leave them out"
            )
        if self.optim.name == "lamb" and self.train.backend.startswith("zero"):
            raise ValueError(
                f"optim.name: lamb needs the norms of whole tensors, which train.backend: "
                f"{self.train.backend} cuts; choose ddp or fsdp2"
            )
        if self.split.train_on_all and self.checkpoint.best is not None:
            raise ValueError(
                f"split.train_on_all leaves no held-out clips for {self.best_setting}; leave out "
                "split.train_on_all, or stop.metric and checkpoint.best"
            )
        last = 0 if self.snapshots.at == "minima" else max(self.snapshots.at)
        if last > self.train.epochs:
            raise ValueError(
                f"snapshots.at names epoch {last}, but train.epochs is {self.train.epochs}"
            )
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys, YAML values), and validate.

    Types are strict: ``seed=010``, ``optim.lr=true`` and ``plan.batch="32"`` are refused.

    Raises:
        ConfigError: a missing or malformed file, an unknown key (with its nearest match), a key
            that is given twice, or a value that does not fit.
    """
    tree = {} if path is None else _read_tree(path)
    _rename(tree, path)
    given = _parse_overrides(overrides)
    for key, value in given.items():
        _assign(tree, key, value)
    try:
        # Strict validation of JSON accepts what YAML can hold: a list for a tuple, text for a path.
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except RecursionError:
        raise ConfigError("the settings are nested too deeply", where=path) from None
    except ValidationError as error:
        key, reason = _first_of(error)
        overridden = next((name for name in given if f"{name}.".startswith(f"{key}.")), None)
        where = COMMAND_LINE if path is None or overridden else path
        fix: str | None
        if reason is None:
            key = overridden or key
            what, fix = f"unknown setting '{_shortened(key)}'", _nearest(key)
        else:
            what = f"setting '{_shortened(key)}': {reason}" if key else reason
            fix = STORE_FIX if key == "store" else None
        raise ConfigError(what, where=where, fix=fix) from None


def _rename(tree: dict[str, Any], path: Path | None) -> None:
    """Give settings their new names, so that an override replaces them by either.

    Raises:
        ConfigError: one is there by both names.
    """
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        inner = tree.get(section)
        if isinstance(inner, dict) and name in inner:
            if new in inner:
                raise ConfigError(
                    f"'{section}.{new}' is given twice", where=path, fix="Give it once."
                )
            inner[new] = inner.pop(name)


def last_of_each(settings: Sequence[str]) -> list[str]:
    """``key=value`` settings with only the last value of each key, as ``load_config`` refuses a key
    that is given twice."""
    return [f"{key}={value}" for key, value in dict(s.split("=", 1) for s in settings).items()]


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML; ``load_config`` of the file gives an equal tree."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """The text that ``dump_config`` writes."""
    return yaml_text(config.model_dump(mode="json"))


def changes(before: Config, now: Config) -> list[str]:
    """What differs, as "optim.lr: 0.001 before, 0.01 now", in the order of the tree."""
    was, new = (dict(leaves(config.model_dump())) for config in (before, now))
    return [
        f"{key}: {was.get(key)} before, {new.get(key)} now"
        for key in {**was, **new}
        if was.get(key) != new.get(key)
    ]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of each leaf of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict) and prefix + name not in MAPPINGS:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _first_of(error: ValidationError) -> tuple[str, str | None]:
    """The key of the first setting that does not fit, and the reason; None for an unknown key.

    Unknown keys come first. If a setting has several forms, the reason is that of each form.
    """
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first, *others = errors
    place, reasons = first["loc"], [_reason(first)]
    if place[:2] == ("plan", "ratio"):
        # After the setting comes the tag of its form.
        place = place[:2] + place[3:]
    if len(place) > 2 and isinstance(place[2], str) and not _is_nested(place):
        # After section and setting comes pydantic's name of a form.
        place = place[:2]
        reasons += [_reason(other) for other in others if other["loc"][:2] == place]
    key = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        return key, None
    # A rule of a section, and a missing key, have no value to show.
    value = "" if isinstance(first["input"], dict) else f", not {_shown(first['input'])}"
    return key, "; or: ".join(reasons) + value


def _is_nested(place: tuple[int | str, ...]) -> bool:
    """Whether a setting has settings of its own."""
    return place[0] in ("clip", "plan") or place[:2] == ("loss", "distill")


def _reason(error: ErrorDetails) -> str:
    match error["type"]:
        case "bool_type":
            return "Input should be true or false"
        case "tuple_type" | "named_tuple_type":
            return "Input should be a list"
        case "model_type":
            return "Input should be a section of 'key: value' settings"
        case "missing":
            return "it must be given"
        case "string_type" if not isinstance(error["input"], dict | list):
            return "Input should be text; put it in quotes if it is meant"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case _:
            return error["msg"]


def _shown(value: object) -> str:
    """A value as YAML, on one line of at most 80 characters."""
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


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The value of each dotted key. A section, such as ``plan={batch: 8}``, gives its leaves."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        shown = _shortened(override)
        if not equals:
            raise _refused(f"'{shown}' is not of the form key=value")
        if not text.strip():
            raise _refused(f"'{shown}' gives no value", fix="Write null for none.")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise _refused(f"the value of '{shown}' is not valid YAML ({error})") from None
        key = key.strip()
        is_section = value and isinstance(value, dict) and key not in MAPPINGS
        parts = leaves(value, f"{key}.") if is_section else [(key, value)]
        for given_name, leaf in parts:
            name = f"train.{RENAMED[given_name]}" if given_name in RENAMED else given_name
            if any(f"{name}.".startswith(f"{o}.") or o.startswith(f"{name}.") for o in given):
                raise _refused(f"'{name}' is given twice", fix="Give it once.")
            given[name] = leaf
    return given


def _refused(what: str, *, fix: str | None = None) -> ConfigError:
    return ConfigError(what, where=COMMAND_LINE, fix=fix)


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise _refused(f"'{dotted}': '{section}' is not a section")
        tree = inner
    tree[leaf] = value


def _dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")


def _nearest(key: str) -> str:
    known = sorted(_dotted_keys(Config))
    if key in known:
        return "Write it below its section; dotted keys are for the command line."
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1)
    ]
    if near:
        return f"Did you mean '{near[0]}'?"
    return "Known sections: " + ", ".join(Config.model_fields)
