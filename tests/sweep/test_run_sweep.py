"""Sweeps of tiny runs: killed and resumed, with trials that fail, and their tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import contents, dist_train, environment, fails, metrics_of, overrides, said
from matplotlib.image import imread
from sklearn.metrics import matthews_corrcoef
from targets import target_store

from dist_train.checkpoint.format import by_step
from dist_train.config import load_config
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation import target_evaluation
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.plain_yaml import yaml_text
from dist_train.run.folder import only_session
from dist_train.run.record import read_record
from dist_train.sweep import plot
from dist_train.sweep.folder import begin_trial, check_trials
from dist_train.sweep.goal import Goal, goal_of
from dist_train.sweep.one_trial import run_trial
from dist_train.sweep.results import Results, collect
from dist_train.sweep.run_sweep import planned, read_sweep, run_sweep
from dist_train.sweep.search import Study
from dist_train.sweep.settings import load_sweep


def written(file: Path, store: Path, **tree: Any) -> Path:
    """A sweep of tiny runs of two epochs."""
    given = [s for s in overrides(store, file, "train.epochs=2", "snapshots.at=[2]")
             if not s.startswith("out=")]  # fmt: skip
    config = load_config(None, given).model_dump(mode="json", exclude_unset=True)
    base = file.with_name("base.yaml")
    base.write_text(yaml_text(config))
    tree = {"out": str(file.with_name("out")), "base": base.name} | tree
    file.write_text(yaml_text(tree))
    return file


def results(file: Path) -> pd.DataFrame:
    return pd.read_csv(file.with_name("out") / "results.csv", keep_default_na=False).set_index(
        "trial"
    )


@pytest.fixture(scope="module")
def done(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a sweep that has ended: three variants, one of which fails; not to be changed."""
    file = written(
        tmp_path_factory.mktemp("sweep") / "sweep.yaml", store,
        variants={
            "plain": [],
            # It is refused before the first step, but only with the store in hand.
            "bad": ["plan.batch=4096"],
            "of-bad": ["trial.of=bad"],
            "sizes": ["trial.kind=logistic"],
            "tta": ["trial.of=plain", "trial.tta=flips"],
        },
        seeds=[0, 1], at_once=2, metric="test/mcc@0.5", reference={"plain": 0.7, "sizes": 0.1},
    )  # fmt: skip
    code = subprocess.run(
        dist_train("sweep", file), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert code.returncode == 1, code.stderr
    assert "error: " in code.stderr
    assert "4 of 10 trials failed. results.csv says why" in code.stderr
    assert "bad-seed1-fold0 failed: " in code.stdout
    return file


@pytest.mark.slow
def test_a_failed_trial_is_told_and_the_others_are_done(done: Path) -> None:
    rows = results(done)
    assert rows["state"].value_counts().to_dict() == {"done": 6, "failed": 4}
    log = (done.with_name("out") / "trials" / "bad-seed0-fold0" / "trial.log").read_text()
    assert rows["error"]["bad-seed0-fold0"] in log
    assert rows["error"]["of-bad-seed0-fold0"] == "it needs bad-seed0-fold0, which failed"


@pytest.mark.slow
def test_the_table_against_plain_numpy(done: Path) -> None:
    out, values = done.with_name("out"), {}
    for seed in (0, 1):
        for variant in ("plain", "sizes", "tta"):
            folder = out / "trials" / f"{variant}-seed{seed}-fold0"
            table = pd.read_csv(folder / "predictions.csv")
            table = table[table["split"] == "test"]
            mcc = matthews_corrcoef(table["label"], table["probability"] > 0.5)
            values.setdefault(variant, []).append(mcc)
            row = results(done).loc[folder.name]
            assert float(row["test/mcc@0.5"]) == pytest.approx(mcc)
            evaluation = json.loads((folder / "evaluation.json").read_text())
            assert float(row["test/mcc"]) == pytest.approx(evaluation["mcc"])
            assert float(row["test/auc"]) == pytest.approx(evaluation["auc"])
    table = pd.read_csv(out / "table.csv").set_index("variant")
    for variant, each in values.items():
        assert table["mean"][variant] == pytest.approx(np.mean(each))
        assert table["sd"][variant] == pytest.approx(np.std(each, ddof=1))
        assert table["low"][variant] <= np.mean(each) <= table["high"][variant]
    assert (table["mean"].dropna().diff().dropna() <= 0).all()
    assert table["trials"].to_dict() == {"plain": 2, "sizes": 2, "tta": 2, "bad": 0, "of-bad": 0}
    assert table["train_seconds"]["plain"] > 0
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # Seeds differ, and what predicts with another's run has its weights.
    first, second = (metrics_of(out / "trials" / f"plain-seed{seed}-fold0") for seed in (0, 1))
    assert first != second
    assert not (out / "trials" / "tta-seed0-fold0" / "snapshots").exists()


@pytest.mark.slow
def test_a_second_call_does_what_is_left_and_changes_nothing_else(done: Path) -> None:
    out = done.with_name("out")
    before = contents(out / "trials" / "plain-seed0-fold0")
    told = fails("sweep", done)
    assert "4 of 10 trials failed" in told
    assert contents(out / "trials" / "plain-seed0-fold0") == before
    with only_session(out, "sweep"):
        assert "another sweep is at work in this folder" in fails("sweep", done)
    changed = done.with_name("changed.yaml")
    changed.write_text(done.read_text().replace("plan.batch=4096", "plan.batch=2048"))
    told = fails("sweep", changed)
    assert "the trial was begun with other settings (plan.batch: 4096 before, 2048 now)" in told
    assert "Name the variant otherwise" in told


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on(store: Path, tmp_path: Path) -> None:
    """Kill it after a checkpoint of its second trial; its processes end with it."""
    file = written(tmp_path / "sweep.yaml", store, set={"train.epochs": 15, "snapshots.at": [15]},
                   variants={"a": ["train.epochs=1", "snapshots.at=[1]"], "b": []})  # fmt: skip
    sweep = subprocess.Popen(
        dist_train("sweep", file), env=environment(), stdout=subprocess.DEVNULL
    )
    folder = tmp_path / "out" / "trials" / "b-seed0-fold0"
    deadline = time.monotonic() + 120
    while not by_step(folder / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    first = contents(tmp_path / "out" / "trials" / "a-seed0-fold0")
    assert "evaluation.json" in first
    assert not (folder / "evaluation.json").exists(), "it was killed too late"
    # The trial's own process has ended when its lock is free.
    while time.monotonic() < deadline:
        try:
            with only_session(folder, "sweep"):
                break
        except RunError:
            time.sleep(0.05)
    said("sweep", file)
    assert contents(tmp_path / "out" / "trials" / "a-seed0-fold0") == first
    assert (results(file)["state"] == "done").all()
    assert read_record(folder)["sessions"][-1]["resumed_from_step"] >= 4
    assert [line["step"] for line in metrics_of(folder)] == list(range(1, 91))


@pytest.mark.slow
def test_optuna_goes_on_with_its_study(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model.stem_stride": [
        [1, 2, 2], [1, 1, 1]]}  # fmt: skip
    tree = {"search": "optuna", "metric": "val/auc"}
    file = written(tmp_path / "s.yaml", store, random={"trials": 1, **space}, **tree)
    said("sweep", file)
    (name,) = results(file).index
    assert name == "optuna0000-seed0-fold0"
    before = contents(tmp_path / "out" / "trials" / name)
    file = written(tmp_path / "s.yaml", store, random={"trials": 2, **space}, **tree)
    said("sweep", file)
    assert contents(tmp_path / "out" / "trials" / name) == before
    assert len(results(file)) == 2
    rates = {load_config(tmp_path / "out" / "trials" / each / "config.yaml").optim.lr
             for each in results(file).index}  # fmt: skip
    assert len(rates) == 2
    file = written(tmp_path / "s.yaml", store, random={"trials": 2, "optim.lr": [1, 2]}, **tree)
    assert "a search of another space or metric" in fails("sweep", file)


def test_a_point_that_failed_stays_failed_in_later_calls(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"trials": 1, "trial.kind": ["logistic"]}
    file = written(tmp_path / "s.yaml", store, search="optuna", metric="val/auc", random=space)
    sweep = load_sweep(file)
    sweep.out.mkdir()
    study = Study(sweep, file)
    (trial,) = study.ask(1)
    assert trial.kind == "logistic"
    study.tell([trial], {trial.name: "the disk is full"})
    (row,) = run_sweep(sweep, file).trials.to_dict("records")
    assert (row["trial"], row["state"], row["error"]) == (trial.name, "failed", "the disk is full")


def test_the_plot_of_many_variants_shows_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "MOST_VARIANTS", 3)
    names = [f"v{number}" for number in range(1200)]
    columns = {"variant": names, "state": "done", "val/auc": 0.5, "low": 0.4, "high": 0.6}
    table = pd.DataFrame(columns | {"mean": 0.5, "reference": np.nan})
    plot.draw(Results("val/auc", table, table, None), tmp_path / "sweep.png")
    assert imread(tmp_path / "sweep.png").shape[0] < 500


@pytest.mark.slow
def test_trials_run_on_ray(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file = written(tmp_path / "sweep.yaml", store, variants={"a": [], "b": ["plan.batch=4096"]},
                   ray=True)  # fmt: skip
    done = subprocess.run(
        dist_train("sweep", file), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "1 of 2 trials failed" in done.stderr
    assert results(file)["state"].tolist() == ["done", "failed"]
    assert "Lower plan.batch" in results(file)["error"]["b-seed0-fold0"]


KINDS = {
    "multiclass": ({}, "test/mcc"),
    "ordinal": ({"target.kind": "ordinal"}, "test/qwk"),
    "multilabel": ({"target.kind": "multilabel", "target.columns": ["left", "right"]}, "test/ap"),
    "regression": ({"target.kind": "regression", "target.columns": ["speed"]}, "test/mae"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_trials_of_other_kinds_are_compared_by_their_own_metrics(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_evaluation, "RESAMPLES", 100)
    settings, metric = KINDS[kind]
    out, store = tmp_path / "out", target_store(tmp_path / "store", kind)
    variants = {"sizes": ["trial.kind=logistic"], "trees": ["trial.kind=boosting"]}
    tree = {"out": str(out), "set": {"store": str(store), **settings}, "variants": variants}
    (tmp_path / "s.yaml").write_text(yaml_text(tree))
    sweep = read_sweep(tmp_path / "s.yaml")
    trials, content, goal = planned(sweep, tmp_path / "s.yaml")
    assert goal == Goal(kind, metric)
    for trial in trials:
        run_trial(begin_trial(out, trial, content[trial.config.store]))
    read: list[Path] = []

    def counted(path: Path) -> pd.DataFrame:
        read.append(path)
        return read_predictions(path)

    monkeypatch.setattr("dist_train.sweep.results.read_predictions", counted)
    found = collect(out, trials, goal, {}, {})
    assert len(read) == len(trials)
    assert found.metric == metric
    assert (found.trials["state"] == "done").all()
    for row in found.trials.to_dict("records"):
        evaluation = json.loads((out / "trials" / row["trial"] / "evaluation.json").read_text())
        for name, figure in evaluation["metrics"].items():
            assert row[f"test/{name}"] == pytest.approx(figure["value"])
    # The best first: of errors the least.
    first, second = found.table["mean"]
    assert first <= second if metric == "test/mae" else first >= second
    assert (found.table["low"] <= found.table["mean"]).all()
    assert (found.table["mean"] <= found.table["high"]).all()
    assert found.table["above_next"][0] > 0.3
    wrong = sweep.model_copy(update={"metric": "test/mcc@0.5"})
    with pytest.raises(ConfigError, match=rf"trials of kind {kind} have no test/mcc@0\.5"):
        goal_of(wrong, trials, check_trials(out, trials))


def test_trials_of_different_targets_are_not_compared(tmp_path: Path) -> None:
    store = target_store(tmp_path / "store", "multiclass")
    variants = {"all": [], "two": ["target.classes=[flowing, stalled]"]}
    tree = {"out": str(tmp_path / "out"), "set": {"store": str(store)}, "variants": variants}
    (tmp_path / "s.yaml").write_text(yaml_text(tree))
    told = fails("sweep", tmp_path / "s.yaml", "--dry-run")
    assert "variant two: its target is binary of flowing, stalled, and that of 'all' is" in told
    tree |= {"variants": {"all": []}, "reference": {"all": 2.0}}
    (tmp_path / "s.yaml").write_text(yaml_text(tree))
    told = fails("sweep", tmp_path / "s.yaml", "--dry-run")
    assert "reference.all: 2 is no mcc, which is in -1..1. Give one in -1..1." in told
    for metric in ("test/mcc", "val/kappa", "test/auc"):
        tree |= {"metric": metric, "reference": {"all": -0.5}}
        (tmp_path / "s.yaml").write_text(yaml_text(tree))
        sweep = read_sweep(tmp_path / "s.yaml")
        if metric != "test/auc":
            assert planned(sweep, tmp_path / "s.yaml")[2].metric == metric
            continue
        with pytest.raises(ConfigError, match=r"-0\.5 is no auc, which is in 0\.\.1"):
            planned(sweep, tmp_path / "s.yaml")


def test_a_folder_of_a_run_is_no_trial(store: Path, trained: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "sweep.yaml", store)
    (tmp_path / "out" / "trials").mkdir(parents=True)
    (tmp_path / "out" / "trials" / "base-seed0-fold0").symlink_to(trained)
    assert "a run that is no trial of a sweep is there" in fails("sweep", file)
    with pytest.raises(RunError, match="it does not say what the trial is"):
        run_trial(trained)


def test_a_trial_ends_when_its_input_is_closed() -> None:
    code = (
        "from dist_train.sweep.one_trial import end_with_input\n"
        "import time\nend_with_input()\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.close()
    assert process.wait(timeout=30) == 1
    process.stdout.close()
