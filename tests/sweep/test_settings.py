"""What a sweep's file says, and what is refused before any trial begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, fails, overrides, said
from hypothesis import given
from hypothesis import strategies as st

from dist_train.config import load_config
from dist_train.errors import ConfigError
from dist_train.plain_yaml import yaml_text
from dist_train.sweep.folder import record_of
from dist_train.sweep.settings import Random, Range, Sweep, load_sweep
from dist_train.sweep.trials import Trial, points_of, trials_of, variants_of


def written(folder: Path, **tree: Any) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml_text(tree))
    return file


def trials(folder: Path, **tree: Any) -> list[Trial]:
    file = written(folder, out=str(folder / "out"), **tree)
    sweep = load_sweep(file)
    return trials_of(sweep, file, variants_of(sweep, file))


def test_variants_by_grid_by_seeds_and_folds(tmp_path: Path) -> None:
    found = trials(
        tmp_path, set={"store": "s"}, seeds=[0, 3], folds=[1, 2],
        variants={"small": ["model.width=8"], "large": ["model.width=16"]},
        grid={"optim.lr": [0.1, 0.01], "model.dropout": [0.0, 0.5]},
    )  # fmt: skip
    assert len(found) == 2 * 4 * 2 * 2
    assert found[5].name == "small_lr=0.1_dropout=0.5-seed0-fold2"
    assert len({trial.name for trial in found}) == len(found)
    for trial in found:
        config = trial.config
        assert config.model.width == (8 if trial.variant.startswith("small") else 16)
        assert f"_lr={config.optim.lr}_dropout={config.model.dropout}" in trial.variant
        assert trial.name.endswith(f"-seed{config.seed}-fold{config.split.fold}")
        assert config.out == tmp_path / "out" / "trials" / trial.name


def test_a_base_is_relative_to_the_file_and_variants_come_over_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("store: s\noptim: {lr: 0.5}\nplan: {batch: 8}\n")
    (one, two) = trials(
        tmp_path, base="base.yaml", set={"plan.batch": 16, "model.width": 8},
        variants={"a": [], "b": ["model.width=4"]},
    )  # fmt: skip
    assert (one.config.optim.lr, one.config.plan.batch, one.config.model.width) == (0.5, 16, 8)
    assert two.config.model.width == 4


def test_what_was_not_given_stays_so_in_the_record_of_a_trial(tmp_path: Path) -> None:
    """The ratio of the plan has another meaning if it is given."""
    given = {"store": "s", "optim": {"lr": 0.5, "betas": [0.5, 0.5]}, "plan": {"batch": 8}}
    (trial,) = trials(tmp_path, set=given)
    config = record_of(trial, "").config
    assert config == trial.config
    assert config.plan.model_fields_set == {"batch"}


def test_runs_of_other_variants(tmp_path: Path) -> None:
    found = {
        trial.name: trial
        for trial in trials(
            tmp_path, set={"store": "s"}, seeds=[0, 1],
            variants={
                "teacher": [],
                "tta": ["trial.of=teacher", "trial.tta=flips"],
                "student": ["loss.distill.teacher=trial:teacher"],
            },
        )
    }  # fmt: skip
    assert found["tta-seed1-fold0"].of == "teacher-seed1-fold0"
    assert found["tta-seed1-fold0"].tta == "flips"
    student = found["student-seed1-fold0"]
    assert student.needs == ("teacher-seed1-fold0",)
    folder = tmp_path / "out" / "trials" / "teacher-seed1-fold0"
    assert student.config.loss.distill.teacher == folder


def test_keys_of_a_trial_are_known_wherever_settings_are(tmp_path: Path) -> None:
    shared = {"store": "s", "trial": {"tta": "flips"}}
    variants = {"net": [], "sizes": ["trial.kind='logistic'"]}
    assert [(t.kind, t.tta) for t in trials(tmp_path, set=shared, variants=variants)] == [
        ("train", "flips"), ("logistic", "none"),
    ]  # fmt: skip
    first, second = trials(
        tmp_path, set={"store": "s"}, grid={"model.init": [None, "trial:init=null"]}
    )
    assert second.config.model.init == first.config.out
    assert second.needs == (first.name,)
    drawn = {"trials": 8, "trial.kind": ["logistic", "boosting"]}
    kinds = {trial.kind for trial in trials(tmp_path, set={"store": "s"}, random=drawn)}
    assert kinds == {"logistic", "boosting"}
    file = written(tmp_path, out="o", set={"store": "s"}, quick={"trial.kind": "logistic"})
    sweep = load_sweep(file)
    for quick, kind in ((False, "train"), (True, "logistic")):
        (trial,) = trials_of(sweep, file, variants_of(sweep, file), quick=quick)
        assert trial.kind == kind


@given(
    low=st.integers(-50, 50), size=st.integers(1, 50), is_log=st.booleans(),
    place=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_place_of_a_range_is_in_it(low: int, size: int, is_log: bool, place: float) -> None:
    low = abs(low) + 1 if is_log else low
    whole = Range(low=low, high=low + size, log=is_log)
    assert isinstance(whole.at(place), int)
    assert low <= whole.at(place) <= low + size
    real = Range(low=float(low), high=float(low + size), log=is_log)
    assert low <= real.at(place) <= low + size


def test_more_random_points_leave_the_others_as_they_are(tmp_path: Path) -> None:
    space = {"optim.lr": Range(low=1e-4, high=1e-1, log=True), "model.width": (4, 8)}
    few, many = (points_of(Random(trials=n, space=space)) for n in (5, 400))
    assert many[:5] == few
    rates = np.log10([point["optim.lr"] for point in many])
    assert abs(rates.mean() + 2.5) < 0.15
    assert 140 < sum(point["model.width"] == 8 for point in many) < 260
    tree = {"trials": 3, "model.width": {"low": 4, "high": 9}}
    names = [trial.variant for trial in trials(tmp_path, set={"store": "s"}, random=tree)]
    assert names == ["random000", "random001", "random002"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"varients": {}}, "unknown key 'varients'. Did you mean 'variants'?"),
    "an unknown metric": ({"metric": "val/kapa"}, "there is no metric 'val/kapa'; there are val"),
    "an empty grid": ({"grid": {"model.width": []}}, "grid.model.width: Tuple should have at"),
    "a value twice": ({"seeds": [1, 1]}, "seeds: it holds a value twice"),
    "a name of no folder": ({"variants": {"../a": []}}, "'../a' is no name of a folder"),
    "names that clash": ({"variants": {"a": [], "A": []}}, "two variants have the name 'A'"),
    "values of one name": ({"grid": {"clip.size": [[1, 23], [12, 3]]}}, "2 variants, but only 1"),
    "an unknown setting": ({"variants": {"a": ["optim.rate=1"]}}, "variant a: "),
    "no key=value": ({"variants": {"a": ["focal"]}}, "'focal' is not of the form key=value"),
    "a setting of its own": ({"set": {"seed": 1}}, "the sweep gives 'seed'; see its 'seeds'"),
    "an unknown model": ({"variants": {"a": ["model.name=resnet3d-19"]}}, "there is no model"),
    "an unknown loss": ({"variants": {"a": ["loss.name=focus"]}}, "there is no loss 'focus'"),
    "an unknown trial key": ({"variants": {"a": ["trial.kin=x"]}}, "unknown key 'trial.kin'"),
    "an unknown kind": ({"variants": {"a": ["trial.kind=x"]}}, "There are train, logistic, boost"),
    "an unknown kind in a grid": ({"grid": {"trial.kind": ["x"]}}, "there is no trial.kind=x"),
    "a later variant": (
        {"variants": {"a": ["trial.of=b"], "b": []}},
        "it refers to 'b', which is no variant above it",
    ),
    "settings of another's run": (
        {"variants": {"b": [], "a": ["trial.of=b", "model.width=8"]}},
        "trial.of takes the settings of that run, so 'model.width' has no place",
    ),
    "a run of a baseline": (
        {"variants": {"b": ["trial.kind=logistic"], "a": ["model.init=trial:b"]}},
        "'b-seed0-fold0' has no run of its own",
    ),
    "a net of a baseline": (
        {"variants": {"a": ["trial.kind=boosting", "model.width=8"]}},
        "a baseline has no 'model.width'",
    ),
    "a search by test clips": (
        {"search": "optuna", "metric": "test/auc", "random": {"trials": 2, "optim.lr": [1, 2]}},
        "test clips must not choose settings (test/auc)",
    ),
    "a search over targets": (
        {
            "search": "optuna",
            "metric": "val/auc",
            "random": {"trials": 2, "target.classes": [["a", "b"], ["a", "c"]]},
        },
        "search: optuna compares trials of one target, so target.classes cannot be in its space",
    ),
    "a search of nothing": ({"search": "optuna"}, "search: optuna needs the space"),
    "a range the wrong way": (
        {"random": {"trials": 2, "optim.lr": {"low": 2, "high": 1}}},
        "low must be below high",
    ),
    "a reference to nothing": ({"reference": {"a": 0.5}}, "and there is no such variant"),
    "too many": ({"grid": {f"a{n}": [*range(100)] for n in range(3)}}, "1000000 trials, more"),
    "too many points": (
        {"random": {"trials": 9000, "model.width": [4, 8]}, "seeds": [0, 1]},
        "these are 18000 trials, more than 10000",
    ),
    "no clips held out": ({"set": {"split.train_on_all": True}}, "holds out no clips to compare"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    tree, message = BAD[case]
    tree = tree | {"set": {"store": str(tmp_path / "no store"), **tree.get("set", {})}}
    told = fails("sweep", written(tmp_path, out=str(tmp_path / "out"), **tree), "--dry-run")
    assert message in told
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_not_there_is_told_before_any_trial(tmp_path: Path) -> None:
    file = written(tmp_path, out=str(tmp_path / "out"), set={"store": str(tmp_path / "none")})
    assert "none" in fails("sweep", file)
    assert not (tmp_path / "out").exists()


def test_folds_of_a_store_with_a_split_of_its_own_are_refused(store: Path, tmp_path: Path) -> None:
    tree = {"out": str(tmp_path / "out"), "set": {"store": str(store)}, "folds": [0, 1]}
    assert "so folds do not differ" in fails("sweep", written(tmp_path, **tree))


def test_the_list_of_trials(store: Path, tmp_path: Path) -> None:
    tree = {"set": {"store": str(store)}, "variants": {"a": [], "b": ["trial.of=a"]}}
    told = said("sweep", written(tmp_path, out=str(tmp_path / "out"), **tree), "--dry-run")
    assert "2 trials" in told
    assert "predicts with" in told
    assert not (tmp_path / "out").exists()


def test_the_shipped_sweep_fits(tmp_path: Path) -> None:
    file = ROOT / "configs" / "ablation.yaml"
    sweep = load_sweep(file)
    found = trials_of(sweep, file, variants_of(sweep, file))
    names = {trial.variant for trial in found}
    assert {"size-only", "2d-lstm", "r18", "r34", "r50", "r101"} <= names
    assert len(found) == len(names) * len(sweep.seeds) * len(sweep.folds)
    assert len(trials_of(sweep, file, variants_of(sweep, file), quick=True)) == len(names)


def test_a_base_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("store: s\noptim: {rate: 1}\n")
    with pytest.raises(ConfigError, match=r"unknown setting 'optim\.rate'"):
        trials(tmp_path, base="base.yaml")
    assert isinstance(Sweep(out=tmp_path), Sweep)
    assert load_config(None, overrides(tmp_path, tmp_path)).store == tmp_path
