"""The file of a sweep, such as ``configs/ablation.yaml``; docs/sweep.md."""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from dist_train.class_metrics import METRICS_OF
from dist_train.config import Place, Section
from dist_train.errors import ConfigError
from dist_train.metrics import METRICS
from dist_train.plain_yaml import read_yaml
from dist_train.targets import Kind

#: Of two classes: of the test clips, MCC at the threshold of the best MCC on the val clips.
FITTED = "test/mcc"
#: Settings that the sweep gives each trial itself, and the key that gives them.
OWN = {"out": "out", "seed": "seeds", "split.fold": "folds"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.=_+-]{0,99}")
MOST_TRIALS = 10_000


def trial_metrics(kind: Kind) -> tuple[str, ...]:
    """The metrics of a trial with a kind of target, from its table of predictions."""
    names = [*(METRICS if kind == "binary" else METRICS_OF[kind])]
    if kind == "multilabel":
        names.append("mcc")
    own = tuple(f"{split}/{name}" for split in ("val", "test") for name in names)
    return (*own, FITTED) if kind == "binary" else own


def _known_metric(name: str) -> str:
    known = dict.fromkeys(metric for kind in get_args(Kind) for metric in trial_metrics(kind))
    if name not in known:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(known)}")
    return name


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError("it holds a value twice")
    return values


def _plain_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of a folder: letters, digits and . = _ + -, at most 100"
        )
    return name


def _trials_apart(given: object) -> object:
    """``trials`` stands beside the keys of settings in the file."""
    if not isinstance(given, dict):
        return given
    space = {key: value for key, value in given.items() if key != "trials"}
    return {"space": space} | {key: given[key] for key in ("trials",) if key in given}


def _true_is_here(given: object) -> object:
    """``ray: true`` and ``ray: ADDRESS`` are short forms."""
    if given is False:
        return None
    return {} if given is True else {"address": given} if isinstance(given, str) else given


class Range(Section):
    """Numbers from low to high; whole ones if both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Draw evenly in the logarithm."""

    @model_validator(mode="after")
    def _grows(self) -> Range:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("log needs low above 0")
        return self

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, place: float) -> float:
        """The value at a place in [0, 1) of the range."""
        top = self.high + 1 if self.is_whole else self.high
        if self.log:
            value = math.exp(math.log(self.low) + place * math.log(top / self.low))
        else:
            value = self.low + place * (top - self.low)
        # Rounding may leave the range.
        return min(max(math.floor(value) if self.is_whole else value, self.low), self.high)


VariantName = Annotated[str, AfterValidator(_plain_name)]
Values = Annotated[tuple[JsonValue, ...], Field(min_length=1), AfterValidator(_distinct)]


class Random(Section):
    """Points drawn from a space of settings."""

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)]
    """Number of points."""
    space: Annotated[dict[str, Range | Values], Field(min_length=1)]


class Ray(Section):
    """The cluster on which trials run; all its machines must see the same folders."""

    address: str | None = None
    """Null takes RAY_ADDRESS, or the cluster that this machine is part of, or starts one here."""
    cpus: Annotated[float, Field(gt=0, le=1024)] = 1
    """Of each trial."""
    gpus: Annotated[float, Field(ge=0, le=64)] = 0
    """Of each trial."""


class Sweep(Section):
    """Which trials there are, and how they run."""

    out: Place
    """Folder of the sweep."""
    base: Place | None = None
    """A file of settings, relative to the sweep's file."""
    set: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of all trials, by dotted key."""
    variants: dict[Annotated[str, AfterValidator(_plain_name)], tuple[str, ...]] = Field(
        default_factory=dict
    )
    """Settings of each variant, as key=value."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Values by dotted key; each combination is a variant, or one of each variant."""
    random: Random | None = None
    """Points of a space: ``trials``, and by dotted key {low, high, log} or a list of values."""
    search: Literal["random", "optuna"] = "random"
    """How points are chosen."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...],
        Field(min_length=1),
        AfterValidator(_distinct),
    ] = (0,)
    folds: Annotated[
        tuple[Annotated[int, Field(ge=0, le=1024)], ...],
        Field(min_length=1),
        AfterValidator(_distinct),
    ] = (0,)
    at_once: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of trials at a time; null is 1, or on Ray as many as the cluster has room for."""
    metric: Annotated[str, AfterValidator(_known_metric)] | None = None
    """The metric of the table and the plot; null is the main one of the test clips."""
    ray: Ray | None = None
    """``true`` takes the defaults; an address is short for one with that alone."""
    quick: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of all trials under --quick."""
    reference: dict[str, float] = Field(default_factory=dict)
    """Known values by variant, to compare with."""

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        if self.search == "optuna":
            if self.random is None:
                raise ValueError("search: optuna needs the space that random gives")
            if self.variants or self.grid:
                raise ValueError("search: optuna takes no variants and no grid")
            for key in self.random.space:
                if key.partition(".")[0] in ("store", "target"):
                    raise ValueError(
                        f"search: optuna compares trials of one target, so {key} cannot be in its "
                        "space"
                    )
            if self.metric is None or self.metric.startswith("test/"):
                raise ValueError(
                    f"test clips must not choose settings ({self.metric or 'by default'}); search: "
                    "optuna needs a metric of val/"
                )
        number = math.prod(map(len, (self.seeds, self.folds, *self.grid.values())))
        number *= len(self.variants) or 1
        number *= 1 if self.random is None else self.random.trials
        if number > MOST_TRIALS:
            raise ValueError(f"these are {number} trials, more than {MOST_TRIALS}")
        if unknown := sorted(self.reference.keys() - self.variants.keys()):
            raise ValueError(f"reference names {unknown[0]!r}, and there is no such variant")
        return self


def load_sweep(path: Path) -> Sweep:
    """Read the file of a sweep.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, or a value that does not fit.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError("must hold the keys of a sweep; docs/sweep.md", where=path)
    # Before JSON is parsed, which alone takes lists for tuples.
    for key, long_form in (("random", _trials_apart), ("ray", _true_is_here)):
        if key in tree:
            tree[key] = long_form(tree[key])
    try:
        return Sweep.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        first, key = errors[0], ".".join(map(str, errors[0]["loc"]))
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            near = difflib.get_close_matches(name, Sweep.model_fields, n=1)
            raise ConfigError(
                f"unknown key {key!r}",
                where=path,
                fix=f"Did you mean {near[0]!r}?"
                if near
                else f"The keys are {', '.join(Sweep.model_fields)}.",
            ) from None
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {reason}" if key else reason, where=path) from None
