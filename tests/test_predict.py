"""Predictions against a computation by hand, and the files that they are written to."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_config, tiny_store
from safetensors.torch import load_file

from dist_train.config import PlanSettings, dump_config
from dist_train.data.manifest import read_manifest
from dist_train.data.prepare import PrepareSettings, prepare
from dist_train.errors import ConfigError, RunError
from dist_train.evaluate import COLUMNS, evaluate, read_predictions
from dist_train.predict import find_snapshots, predict
from dist_train.run import make_model, open_data, open_run
from dist_train.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with snapshots and no predictions; not to be changed."""
    folder = tmp_path_factory.mktemp("predict")
    # A low rate, so that the probabilities are not all near 0 and 1.
    train(tiny_config(tiny_store(folder / "store"), folder / "run", "optim.lr=1e-3"))
    return folder / "run"


@pytest.fixture(scope="module")
def predicted(trained: Path) -> Path:
    """The same run with predictions; not to be changed."""
    run = trained.with_name("predicted")
    shutil.copytree(trained, run)
    predict(run)
    return run


@pytest.fixture
def run(predicted: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(predicted, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def new_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of five clips without labels, of depths 5 to 9."""
    folder = tmp_path_factory.mktemp("new")
    random = np.random.default_rng(5)
    for depth in range(5, 10):
        np.save(folder / f"clip{depth}.npy", random.integers(0, 256, (depth, 20, 18), np.uint8))
    names = "".join(f"clip{depth}.npy\n" for depth in range(5, 10))
    (folder / "new.csv").write_text(f"filename\n{names}")
    manifest = read_manifest(folder / "new.csv", unlabelled=True)
    prepare(manifest, folder, folder / "store", PrepareSettings(roi="none"), workers=1)
    return folder / "store"


def test_the_mean_over_snapshots_by_hand(predicted: Path) -> None:
    config = open_run(predicted)
    data = open_data(config)
    model = make_model(config).eval()
    table = read_predictions(predicted / "predictions.csv").set_index("key")
    assert len(find_snapshots(predicted)) == 2
    for clip in [*data.numbers("val"), *data.numbers("test")]:
        volume = torch.from_numpy(data.store.read(clip)).float()[None, None] / 255
        probabilities = []
        for snapshot in find_snapshots(predicted):
            model.load_state_dict(load_file(snapshot))
            with torch.no_grad():
                probabilities.append(float(torch.sigmoid(model(volume, None).double())))
        row = table.loc[data.store.table["key"].iloc[clip]]
        assert row["probability"] == pytest.approx(np.mean(probabilities), abs=1e-6)
        assert abs(probabilities[0] - probabilities[1]) > 1e-5, "the snapshots say the same"


def test_all_held_out_clips_are_predicted_once(predicted: Path) -> None:
    table = read_predictions(predicted / "predictions.csv")
    assert tuple(table.columns) == COLUMNS
    assert table["key"].is_unique
    assert table.groupby("split")["label"].agg(["count", "sum"]).to_dict("index") == {
        "test": {"count": 10, "sum": 4.0}, "val": {"count": 10, "sum": 4.0}
    }  # fmt: skip
    assert (table["frames"] == 8).all()


def test_snapshots_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    for step in (100, 9, 20):
        (tmp_path / "snapshots" / f"step-{step}.safetensors").write_bytes(b"")
    for foreign in ("step-300.safetensors.partial", "step-x.safetensors", "step-²", "best"):
        (tmp_path / "snapshots" / foreign).write_bytes(b"")
    assert [path.stem for path in find_snapshots(tmp_path)] == ["step-9", "step-20", "step-100"]


def test_the_submission_agrees_with_the_evaluation(predicted: Path) -> None:
    judged = evaluate(predicted / "predictions.csv")
    table = read_predictions(predicted / "predictions.csv")
    test = table[table["split"] == "test"]
    submission = pd.read_csv(predicted / "submission.csv")
    assert submission["filename"].tolist() == test["filename"].tolist()
    called = submission["stalled"].to_numpy() == 1
    truth = test["label"].to_numpy() == 1
    (tn, fp), (fn, tp) = judged.confusion
    assert (tp, fp) == (np.sum(called & truth), np.sum(called & ~truth))
    assert (fn, tn) == (np.sum(~called & truth), np.sum(~called & ~truth))


def test_the_submission_is_the_form_of_the_challenge(predicted: Path) -> None:
    lines = (predicted / "submission.csv").read_text().splitlines()
    assert lines[0] == "filename,stalled"
    assert len(lines) == 11
    assert all(re.fullmatch(r"store\.npz/test_\d{5},[01]", line) for line in lines[1:])


def test_a_probability_at_the_threshold_is_not_called_positive(run: Path) -> None:
    table = read_predictions(run / "predictions.csv")
    test = table[table["split"] == "test"].sort_values("probability")
    predict(run, threshold=float(test["probability"].iloc[4]))
    submission = pd.read_csv(run / "submission.csv").set_index("filename")["stalled"]
    assert submission[test["filename"]].tolist() == [0] * 5 + [1] * 5


def test_where_val_lacks_a_class_the_threshold_is_one_half(
    run: Path, new_clips: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(run / "predictions.csv")
    table.loc[table["split"] == "val", "label"] = 0
    table.to_csv(run / "predictions.csv", index=False)
    out = predict(run, store=new_clips, out=tmp_path / "new")
    submission = pd.read_csv(tmp_path / "new" / "submission.csv")["stalled"]
    assert ((pd.read_csv(out)["probability"] > 0.5) == (submission == 1)).all()


def test_worker_processes_change_nothing(run: Path, predicted: Path) -> None:
    config = open_run(run)
    workers = config.loader.model_copy(update={"workers": 1})
    dump_config(config.model_copy(update={"loader": workers}), run / "config.yaml")
    predict(run)
    for name in ("predictions.csv", "submission.csv"):
        assert (run / name).read_bytes() == (predicted / name).read_bytes()


def test_progress_counts_every_clip_of_every_snapshot(run: Path) -> None:
    seen: list[tuple[int, int]] = []
    predict(run, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("prior", [0.003, 0.25, 0.6])
def test_calibration_is_bayes_rule_for_the_prior(run: Path, prior: float) -> None:
    """In odds: times the prior's odds, over those of the batches, which are 1 to 3."""
    table = read_predictions(predict(run, prior=prior))
    odds = table["probability"] / (1 - table["probability"]) * (prior / (1 - prior)) * 3
    assert table["calibrated"].to_numpy() == pytest.approx((odds / (1 + odds)).to_numpy())


def test_the_natural_share_is_the_prior_unless_given(run: Path, predicted: Path) -> None:
    natural = read_predictions(predict(run, prior=0.3))
    assert natural.equals(read_predictions(predicted / "predictions.csv"))


def test_new_clips_need_no_labels(predicted: Path, new_clips: Path, tmp_path: Path) -> None:
    before = (predicted / "predictions.csv").read_bytes()
    table = pd.read_csv(predict(predicted, store=new_clips, out=tmp_path / "new"))
    assert table["filename"].tolist() == [f"clip{depth}.npy" for depth in range(5, 10)]
    assert table["frames"].tolist() == [5, 6, 7, 8, 9]
    assert table[["label", "split", "group"]].isna().all(axis=None)
    assert table["probability"].between(0, 1).all()
    threshold = evaluate(predicted / "predictions.csv").threshold
    submission = pd.read_csv(tmp_path / "new" / "submission.csv")
    assert submission["stalled"].tolist() == (table["probability"] > threshold).tolist()
    assert (predicted / "predictions.csv").read_bytes() == before


def test_a_clip_is_predicted_the_same_in_any_company(
    predicted: Path, new_clips: Path, run: Path, tmp_path: Path
) -> None:
    """Clips of five depths share one batch, or are two and two."""
    config = open_run(run)
    plan = PlanSettings(batch=2, ratio=(1, 1))
    dump_config(config.model_copy(update={"plan": plan}), run / "config.yaml")
    together = pd.read_csv(predict(predicted, store=new_clips, out=tmp_path / "a"))
    in_pairs = pd.read_csv(predict(run, store=new_clips, out=tmp_path / "b"))
    assert in_pairs["probability"].to_numpy() == pytest.approx(
        together["probability"].to_numpy(), abs=1e-6
    )


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_an_impossible_prior_is_refused_before_anything_is_computed(
    run: Path, prior: float
) -> None:
    def fail(done: int, total: int) -> None:
        pytest.fail("it began to predict")

    with pytest.raises(ConfigError, match=r"^prior: .* strictly between 0 and 1"):
        predict(run, prior=prior, progress=fail)


def test_new_clips_go_to_a_folder_of_their_own(predicted: Path, new_clips: Path) -> None:
    for out in (None, predicted, predicted / ".." / predicted.name):
        with pytest.raises(RunError, match="need a folder of their own"):
            predict(predicted, store=new_clips, out=out)


def test_new_clips_before_the_runs_own_need_a_threshold(
    trained: Path, new_clips: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="there are no predictions"):
        predict(trained, store=new_clips, out=tmp_path)
    predict(trained, store=new_clips, out=tmp_path, threshold=0.0)
    assert pd.read_csv(tmp_path / "submission.csv")["stalled"].tolist() == [1] * 5


@pytest.mark.parametrize("damage", ["torn", "another model"])
def test_a_snapshot_that_does_not_fit_is_named(run: Path, damage: str) -> None:
    path = find_snapshots(run)[0]
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        config = open_run(run)
        model = config.model.model_copy(update={"width": 8})
        dump_config(config.model_copy(update={"model": model}), run / "config.yaml")
    with pytest.raises(RunError, match="the snapshot does not fit the run") as caught:
        predict(run)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("threshold", [float("nan"), -0.1, 1.1])
def test_a_threshold_that_is_no_probability(predicted: Path, threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold: .* is not a probability"):
        predict(predicted, threshold=threshold)


def test_names_of_predictions_are_no_formulas(predicted: Path, tmp_path: Path) -> None:
    """The submission keeps them, as its form has them."""
    random = np.random.default_rng(5)
    np.save(tmp_path / "=cmd.npy", random.integers(0, 256, (5, 20, 18), np.uint8))
    (tmp_path / "new.csv").write_text("filename,group\n=cmd.npy,@x\n")
    manifest = read_manifest(tmp_path / "new.csv", unlabelled=True)
    store = tmp_path / "store"
    prepare(manifest, tmp_path, store, PrepareSettings(roi="none"), workers=1)
    out = predict(predicted, store=store, out=tmp_path / "out", threshold=0.5)
    table = pd.read_csv(out)
    assert table[["filename", "group"]].to_numpy().tolist() == [["'=cmd.npy", "'@x"]]
    assert pd.read_csv(tmp_path / "out" / "submission.csv")["filename"].tolist() == ["=cmd.npy"]
