"""Predictions against a computation by hand, and the files that they are written to."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import contents, fails, said, tiny_config, tiny_store, trained_so
from safetensors.torch import load_file
from scipy.special import expit, logit
from torch.nn.modules.module import register_module_forward_pre_hook

from dist_train.config import dump_config, load_config
from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.store.reader import Store
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import BackendError, ConfigError, RunError, StoreError
from dist_train.evaluation import ensemble
from dist_train.evaluation.calibration import Calibration, fit
from dist_train.evaluation.evaluate import evaluate, val_threshold
from dist_train.evaluation.predict import find_snapshots, predict
from dist_train.evaluation.prediction_table import COLUMNS, read_predictions
from dist_train.evaluation.submission import make_submission
from dist_train.metrics import prior_correct
from dist_train.models.resnet3d import ResNet3D
from dist_train.run.data import open_data
from dist_train.run.model import make_model
from dist_train.run.record import open_run
from dist_train.training.train import train

NEW_NAMES = ("=cmd.npy", "a.npy", "b.npy", "c.npy", "d.npy")


def must_not_begin(done: int, total: int) -> None:
    pytest.fail("it began to predict")


@contextmanager
def memory_for(clips: int) -> Iterator[list[int]]:
    """Inject errors where a model gets more clips at once, and note the sizes of other batches."""
    seen: list[int] = []

    def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, ResNet3D) and not inputs[0].is_meta:
            if len(inputs[0]) > clips:
                raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nMore is told here.")
            seen.append(len(inputs[0]))

    hook = register_module_forward_pre_hook(check)
    try:
        yield seen
    finally:
        hook.remove()


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
    """A store of five clips without labels, of depths 5 to 9; a name is a formula."""
    folder = tmp_path_factory.mktemp("new")
    random = np.random.default_rng(5)
    for depth, name in zip(range(5, 10), NEW_NAMES, strict=True):
        np.save(folder / name, random.integers(0, 256, (depth, 20, 18), np.uint8))
    (folder / "new.csv").write_text("filename\n" + "".join(f"{name}\n" for name in NEW_NAMES))
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
        row = table.loc[data.store.table["key"][clip]]
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


def test_the_submission_agrees_with_the_evaluation(predicted: Path) -> None:
    judged = evaluate(predicted / "predictions.csv")
    table = read_predictions(predicted / "predictions.csv")
    test = table[table["split"] == "test"]
    lines = (predicted / "submission.csv").read_text().splitlines()
    assert lines[0] == "filename,stalled"
    assert all(re.fullmatch(r"store\.npz/test_\d{5},[01]", line) for line in lines[1:])
    submission = pd.read_csv(predicted / "submission.csv")
    assert submission["filename"].tolist() == test["filename"].tolist()
    called = submission["stalled"].to_numpy() == 1
    truth = test["label"].to_numpy() == 1
    (tn, fp), (fn, tp) = judged.confusion
    assert (tp, fp) == (np.sum(called & truth), np.sum(called & ~truth))
    assert (fn, tn) == (np.sum(~called & truth), np.sum(~called & ~truth))


def test_a_probability_at_the_threshold_is_not_called_positive(run: Path) -> None:
    table = read_predictions(run / "predictions.csv")
    test = table[table["split"] == "test"].sort_values("calibrated")
    predict(run, threshold=float(test["calibrated"].iloc[4]))
    submission = pd.read_csv(run / "submission.csv").set_index("filename")["stalled"]
    assert submission[test["filename"]].tolist() == [0] * 5 + [1] * 5


def test_where_val_lacks_a_class_the_threshold_is_one_half() -> None:
    calibration = fit([0.3, 0.9], [0, 0], batches_share=0.25, prior=0.1)
    assert val_threshold(calibration, np.array([0.3, 0.9]), np.zeros(2)) == 0.5


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


@pytest.mark.parametrize("prior", [0.003, 0.6])
def test_calibration_is_bayes_rule_for_the_prior(run: Path, prior: float) -> None:
    """In odds: times the prior's odds, over those of the batches, which are 1 to 3."""
    table = read_predictions(predict(run, prior=prior))
    odds = table["probability"] / (1 - table["probability"]) * (prior / (1 - prior)) * 3
    assert table["calibrated"].to_numpy() == pytest.approx((odds / (1 + odds)).to_numpy())


def test_new_clips_get_the_mapping_that_is_fitted_on_val(
    run: Path, new_clips: Path, tmp_path: Path
) -> None:
    """The labels of val contradict a model that is too sure."""
    table = read_predictions(run / "predictions.csv")
    wide = pd.concat([table[table["split"] == "val"]] * 10, ignore_index=True)
    odds = logit(np.random.default_rng(0).uniform(0.02, 0.98, len(wide)))
    wide["key"] = [f"clip {number}" for number in range(len(wide))]
    wide["label"] = (np.random.default_rng(1).random(len(wide)) < expit(odds)).astype(int)
    share = wide["label"].mean()
    wide["probability"] = prior_correct(expit(4 * odds), share, 0.25)
    wide.to_csv(run / "predictions.csv", index=False)
    (run / "predictions.json").unlink()
    new = pd.read_csv(predict(run, store=new_clips, out=tmp_path / "new", prior=0.1))
    told = Calibration.model_validate_json((tmp_path / "new" / "calibration.json").read_text())
    assert told.method == "temperature"
    assert 1 / told.slope == pytest.approx(4, rel=0.4)
    softer = expit(told.slope * logit(prior_correct(new["probability"], 0.25, share)))
    np.testing.assert_allclose(new["calibrated"], prior_correct(softer, share, 0.1), rtol=1e-6)


def test_the_natural_share_is_the_prior_unless_given(run: Path, predicted: Path) -> None:
    natural = read_predictions(predict(run, prior=0.3))
    assert natural.equals(read_predictions(predicted / "predictions.csv"))


def test_new_clips_need_no_labels(predicted: Path, new_clips: Path, tmp_path: Path) -> None:
    before = (predicted / "predictions.csv").read_bytes()
    table = pd.read_csv(predict(predicted, store=new_clips, out=tmp_path / "new"))
    assert table["filename"].tolist() == ["'=cmd.npy", *NEW_NAMES[1:]], "a formula is quoted"
    assert table["frames"].tolist() == [5, 6, 7, 8, 9]
    assert table[["label", "split", "group"]].isna().all(axis=None)
    assert table["probability"].between(0, 1).all()
    threshold = evaluate(predicted / "predictions.csv").threshold
    submission = pd.read_csv(tmp_path / "new" / "submission.csv")
    assert submission["filename"].tolist() == list(NEW_NAMES)
    assert submission["stalled"].tolist() == (table["calibrated"] > threshold).tolist()
    assert (predicted / "predictions.csv").read_bytes() == before


def test_a_clip_is_predicted_the_same_in_any_company(
    predicted: Path, new_clips: Path, run: Path, tmp_path: Path
) -> None:
    """Clips of five depths share one batch, or are two and two."""
    trained_so(run, "plan.batch=2", "plan.ratio=[1, 1]")
    together = pd.read_csv(predict(predicted, store=new_clips, out=tmp_path / "a"))
    in_pairs = pd.read_csv(predict(run, store=new_clips, out=tmp_path / "b"))
    assert in_pairs["probability"].to_numpy() == pytest.approx(
        together["probability"].to_numpy(), abs=1e-6
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("prior", 0.0), ("prior", 1.0), ("threshold", np.nan), ("threshold", 2)]
)
def test_an_impossible_number_is_refused_before_anything_is_computed(
    predicted: Path, setting: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: .* is no"):
        predict(predicted, progress=must_not_begin, **{setting: value})


def test_new_clips_go_to_a_folder_of_their_own(predicted: Path, new_clips: Path) -> None:
    for out in (None, predicted, predicted / ".." / predicted.name):
        with pytest.raises(RunError, match="need a folder of their own"):
            predict(predicted, store=new_clips, out=out)


def test_new_clips_before_the_runs_own_need_a_threshold(
    trained: Path, new_clips: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="there are no predictions"):
        predict(trained, store=new_clips, out=tmp_path)
    on_all = Path(shutil.copytree(trained, tmp_path / "run"))
    trained_so(on_all, "split.train_on_all=true")
    with pytest.raises(RunError, match=r"no clips to fit the threshold on.*--threshold"):
        predict(on_all, store=new_clips, out=tmp_path)
    predict(trained, store=new_clips, out=tmp_path, threshold=0.0)
    assert pd.read_csv(tmp_path / "submission.csv")["stalled"].tolist() == [1] * 5


def test_batches_are_halved_where_memory_does_not_suffice(run: Path, predicted: Path) -> None:
    with memory_for(3) as seen:
        predict(run)
    # 20 clips by 8 become those by 2, for two snapshots.
    assert seen == [2] * 20
    table, whole = (read_predictions(r / "predictions.csv") for r in (run, predicted))
    assert table["probability"].to_numpy() == pytest.approx(whole["probability"].to_numpy())
    with (
        pytest.raises(RunError, match="does not suffice to predict a single clip"),
        memory_for(0),
    ):
        predict(run)


def test_clips_are_read_once_whatever_the_memory_for_them(
    run: Path, predicted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are held while the snapshots take turns; where none can be, they are by ones."""
    read: list[int] = []
    read_into = Store.read_into

    def noted(store: Store, out: np.ndarray, clip: int) -> None:
        read.append(int(clip))
        read_into(store, out, clip)

    monkeypatch.setattr(Store, "read_into", noted)
    for held in (1, ensemble.HELD):
        monkeypatch.setattr(ensemble, "HELD", held)
        read.clear()
        predict(run)
        assert len(read) == len(set(read)) == 20
        assert (run / "predictions.csv").read_bytes() == (
            predicted / "predictions.csv"
        ).read_bytes()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", Path("/proc/self")):
        with pytest.raises(OSError, match=re.escape(str(out))):
            predict(run, out=out, progress=must_not_begin)


@pytest.mark.parametrize("name", ["submission.csv", "config.yaml"])
def test_files_of_others_are_not_replaced(run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("filename,stalled\nmine.mp4,1\n")
    before = contents(out)
    assert f"('{name}' is in it)" in fails("predict", run, "--out", out)
    assert contents(out) == before
    (out / name).unlink()
    said("predict", run, "--out", out)
    said("predict", run, "--out", out, "--prior", 0.5)
    (out / "submission.csv").unlink()
    (out / "submission.csv").mkdir()
    assert "submission.csv: is a folder" in fails("predict", run, "--out", out)


def test_a_table_that_was_edited_after_it_was_predicted_is_refused(run: Path) -> None:
    path = run / "predictions.csv"
    said("evaluate", run)
    text = path.read_text()
    forged = text.replace(",test,1,0", ",test,1,0.9", 1)
    assert forged != text
    path.write_text(forged)
    for command in ("evaluate", "report"):
        assert fails(command, run).startswith(f"{path}: the table is not as it was predicted. ")
    said("predict", run)
    said("evaluate", run)


def test_predictions_of_other_snapshots_than_the_run_has_are_refused(run: Path) -> None:
    said("evaluate", run)
    first, last = find_snapshots(run)
    shutil.copyfile(last, first)
    for command in ("evaluate", "report"):
        message = fails(command, run)
        assert "predictions of snapshots that the run does not have now (step-12)" in message
    first.unlink()
    assert "does not have now (step-12)" in fails("evaluate", run)


def test_predictions_that_are_older_than_a_snapshot_are_told(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copyfile(find_snapshots(run)[0], run / "snapshots" / "step-24.safetensors")
    with caplog.at_level(logging.WARNING):
        said("evaluate", run)
    assert "made before step-24. Make the predictions again" in caplog.text
    caplog.clear()
    (run / "predictions.json").unlink()
    with caplog.at_level(logging.WARNING):
        said("evaluate", run)
    assert "the snapshots that these were made from are not known" in caplog.text


@pytest.mark.parametrize("asked", ["test", "val", ""])
def test_a_submission_has_every_row_of_the_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    """In its order, and of its split, if the manifest gives splits. A clip that was rejected has
    the likelier class, and is told."""
    random = np.random.default_rng(5)
    rows = ["filename,label,split"]
    for number in range(8):
        clip = random.integers(0, 256, (4, 16, 16), np.uint8)
        np.save(tmp_path / f"{number}.npy", clip)
        split = (asked if number < 4 else "train") if asked else ""
        rows.append(f"{number}.npy,{number % 2},{split}")
    for bad in (2, 5):
        (tmp_path / f"{bad}.npy").write_bytes(b"no clip")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    settings, folder = PrepareSettings(roi="none"), tmp_path / "store"
    manifest = read_manifest(tmp_path / "clips.csv")
    prepare(manifest, tmp_path, folder, settings, workers=1, max_rejected=0.5)
    store = Store(folder)
    table = store.table.frame().iloc[::-1].assign(calibrated=0.2)
    for likelier in (0, 1):
        submission = make_submission(table, 0.5, store, rejected_as=likelier)
        names = range(4 if asked else 8)
        assert submission["filename"].tolist() == [f"{number}.npy" for number in names]
        expected = [likelier if number in (2, 5) else 0 for number in names]
        assert submission["stalled"].tolist() == expected
    assert f"of the {len(names)} rows of submission.csv are of clips that the" in caplog.text
    (folder / "manifest.csv").unlink()
    with pytest.raises(StoreError, match=r"manifest\.csv: rows of rejected clips are missing"):
        make_submission(table, 0.5, store, rejected_as=0)


def test_under_a_launcher_the_cpu_must_be_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training. ``train.device`` may be edited after it."""
    trained_so(run, "train.device=auto")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no CUDA device here, and a launcher started"):
        predict(run)
    dump_config(load_config(run / "config.yaml", ["train.device=cpu"]), run / "config.yaml")
    predict(run)
