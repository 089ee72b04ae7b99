"""The trials of a sweep: each variant, seed and fold, with its settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dist_train.config import Config, leaves, load_config
from dist_train.errors import ConfigError, DistTrainError
from dist_train.evaluation.flips import Tta, views_of
from dist_train.extensions import is_import_path
from dist_train.models.registry import find_model
from dist_train.plain_yaml import parse_yaml
from dist_train.sweep.settings import NAME, OWN, Random, Range, Sweep
from dist_train.training.losses import LOSSES

#: "train", or the model of a baseline of sizes alone.
Kind = Literal["train", "logistic", "boosting"]
#: The settings that baselines heed.
OF_BASELINES = ("store", "target.", "select.", "split.")
#: A value that begins so stands for the run of another variant, with the same seed and fold.
RUN_OF = "trial:"
TRIALS = "trials"
#: YAML texts by dotted key.
Settings = dict[str, str]


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        of: name of the trial with whose run it predicts; None trains its own.
        needs: names of the trials that must be done before.
    """

    variant: str
    config: Config
    kind: Kind = "train"
    tta: Tta = "none"
    of: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return name_of(self.variant, self.config.seed, self.config.split.fold)


def name_of(variant: str, seed: int, fold: int) -> str:
    return f"{variant}-seed{seed}-fold{fold}"


def points_of(random: Random) -> list[dict[str, Any]]:
    """The points of a random search. More trials do not change the ones before."""
    points = []
    for number in range(random.trials):
        draw = np.random.default_rng([0, number])
        points.append({key: _drawn(choice, draw) for key, choice in sorted(random.space.items())})
    return points


def _drawn(choice: Range | tuple[Any, ...], draw: np.random.Generator) -> Any:
    place = float(draw.random())
    return choice.at(place) if isinstance(choice, Range) else choice[int(place * len(choice))]


def variants_of(sweep: Sweep, file: Path) -> dict[str, Settings]:
    """The settings of each variant by its name: variants by grid by random points.

    Raises:
        ConfigError: two have the same name.
    """
    given = {name: _parsed(name, texts, file) for name, texts in sweep.variants.items()}
    combined = (dict(zip(sweep.grid, each, strict=True)) for each in product(*sweep.grid.values()))
    grids = {_point_name(point): texts_of(point) for point in combined}
    if len(grids) < (expected := math.prod(map(len, sweep.grid.values()))):
        raise ConfigError(
            f"grid gives {expected} variants, but only {len(grids)} names",
            where=file,
            fix="Name them yourself, as variants.",
        )
    points: dict[str, Settings] = {"": {}}
    if sweep.random is not None and sweep.search == "random":
        drawn = enumerate(points_of(sweep.random))
        points = {f"random{number:03}": texts_of(point) for number, point in drawn}
    found: dict[str, Settings] = {}
    # File systems may not tell upper from lower case.
    taken: set[str] = set()
    for parts in product(given or {"": {}}, grids, points):
        name = "_".join(filter(None, parts)) or "base"
        settings = given.get(parts[0], {}) | grids[parts[1]] | points[parts[2]]
        if name.casefold() in taken:
            raise ConfigError(f"two variants have the name '{name}'", where=file)
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' is no name of a folder", where=file, fix="Name it yourself, by variants."
            )
        found[name] = settings
        taken.add(name.casefold())
    return found


def texts_of(values: Mapping[str, Any]) -> Settings:
    """The YAML text of each value; JSON is YAML."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def _unquoted(text: str) -> str:
    """The string that a YAML text in quotes stands for; any other text as it is."""
    if not text.startswith(("'", '"')):
        return text
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _point_name(point: Mapping[str, Any]) -> str:
    """As "lr=0.001_width=16"."""
    leaves = [key.rpartition(".")[2] for key in point]
    names = leaves if len(set(leaves)) == len(leaves) else list(point)
    return "_".join(
        f"{name}={re.sub(r'[^A-Za-z0-9.+-]+', '', text)}"
        for name, text in zip(names, texts_of(point).values(), strict=True)
    )


def _parsed(variant: str, texts: Sequence[str], file: Path) -> Settings:
    settings: Settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"'{text}' is not of the form key=value", where=_at(file, variant))
        if key.strip() in settings:
            raise ConfigError(f"'{key.strip()}' is given twice", where=_at(file, variant))
        settings[key.strip()] = value.strip()
    return settings


def trials_of(
    sweep: Sweep, file: Path, variants: Mapping[str, Settings], *, quick: bool = False
) -> list[Trial]:
    """The trials of these variants for each seed and fold, checked as far as settings alone allow.

    Args:
        file: the sweep's file, for messages, and as the place that ``base`` is relative to.
        quick: the first seed and fold only, with the settings of ``quick``.

    Raises:
        ConfigError, ModelError: settings do not fit, or name what does not exist.
    """
    seeds, folds = (sweep.seeds[:1], sweep.folds[:1]) if quick else (sweep.seeds, sweep.folds)
    trials: dict[str, Trial] = {}
    first, last = (texts_of(dict(leaves(g))) for g in (sweep.set, sweep.quick if quick else {}))
    for name, settings in variants.items():
        for seed, fold in product(seeds, folds):
            trial = _trial(sweep, file, name, first | settings | last, seed, fold, trials)
            trials[trial.name] = trial
    return list(trials.values())


def _trial(
    sweep: Sweep,
    file: Path,
    variant: str,
    settings: Settings,
    seed: int,
    fold: int,
    above: Mapping[str, Trial],
) -> Trial:
    where = _at(file, variant)
    shared = {key for given in (sweep.set, sweep.quick) for key, _ in leaves(given)}
    special = {k: _unquoted(text) for k, text in settings.items() if k.startswith("trial.")}
    plain = {key: value for key, value in settings.items() if key not in special}
    if unknown := sorted(special.keys() - {"trial.kind", "trial.of", "trial.tta"}):
        raise ConfigError(
            f"unknown key '{unknown[0]}'",
            where=where,
            fix="Those of a trial are trial.kind, trial.of and trial.tta.",
        )
    for key in plain:
        if key in OWN:
            raise ConfigError(f"the sweep gives '{key}'; see its '{OWN[key]}'", where=where)
    kind, tta = special.get("trial.kind", "train"), special.get("trial.tta", "none")
    for key, value, known in (("kind", kind, get_args(Kind)), ("tta", tta, get_args(Tta))):
        if value not in known:
            raise ConfigError(
                f"there is no trial.{key}={value}",
                where=where,
                fix=f"There are {', '.join(known)}.",
            )
    if kind != "train":
        if "trial.tta" in shared:
            tta = "none"
        vain = next((k for k in plain.keys() - shared if not k.startswith(OF_BASELINES)), None)
        if vain is not None or tta != "none":
            raise ConfigError(f"a baseline has no '{vain or 'trial.tta'}'", where=where)
    needs: list[str] = []

    def run_of(other: str) -> str:
        name = name_of(other, seed, fold)
        if name not in above:
            raise ConfigError(f"it refers to '{other}', which is no variant above it", where=where)
        needs.append(name)
        return name

    if "trial.of" in special:
        if own := sorted(plain.keys() - shared):
            raise ConfigError(
                f"trial.of takes the settings of that run, so '{own[0]}' has no place",
                where=where,
            )
        source = above[run_of(special["trial.of"])]
        if source.of is not None or source.kind != "train":
            raise ConfigError(f"'{source.variant}' has no run of its own", where=where)
        trial = Trial(variant, source.config, kind, tta, source.name, tuple(needs))  # type: ignore[arg-type]
    else:
        for key, text in plain.items():
            value = _unquoted(text)
            if value.startswith(RUN_OF):
                other = run_of(value.removeprefix(RUN_OF))
                if above[other].of is not None or above[other].kind != "train":
                    raise ConfigError(f"'{other}' has no run of its own", where=where)
                plain[key] = json.dumps(str(sweep.out / TRIALS / other))
        out = sweep.out / TRIALS / name_of(variant, seed, fold)
        plain |= texts_of({"out": str(out), "seed": seed, "split.fold": fold})
        base = None if sweep.base is None else file.parent / sweep.base
        try:
            config = load_config(base, [f"{key}={value}" for key, value in plain.items()])
            find_model(config.model.name)
            _check_loss(config.loss.name)
            views_of(tta, config.augment)  # type: ignore[arg-type]
        except DistTrainError as error:
            raise type(error)(f"{error}", where=where) from None
        if config.split.train_on_all:
            raise ConfigError("split.train_on_all holds out no clips to compare", where=where)
        trial = Trial(variant, config, kind, tta, None, tuple(needs))  # type: ignore[arg-type]
    return trial


def _check_loss(name: str) -> None:
    if not (name == "auto" or name in LOSSES or is_import_path(name)):
        raise ConfigError(f"there is no loss {name!r}", fix=f"There are auto, {', '.join(LOSSES)}.")


def _at(file: Path, variant: str) -> str:
    return f"{file}, variant {variant}"
