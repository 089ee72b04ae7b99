"""The card beside an export says what the run's files say, and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import fails, overrides, said, trained_so

from dist_train import __version__
from dist_train.config import load_config
from dist_train.data.store.build import prepare_arrays
from dist_train.data.store.reader import Store
from dist_train.data.table.labels import Naming
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import FileError, RunError
from dist_train.evaluation.card_of_run import evaluated
from dist_train.evaluation.evaluate import Evaluation
from dist_train.evaluation.export import export_run
from dist_train.evaluation.exported import load_exported
from dist_train.evaluation.model_card import ModelCard, as_markdown
from dist_train.run.folder import EVALUATION
from dist_train.run.record import _write_record, read_record
from dist_train.run.snapshots import stored_checksum
from dist_train.training.train import train


def described_store(folder: Path) -> Path:
    """60 clips of 4 to 9 frames, 15 of them stalled, of 12 groups, at 20 frames a second or 10."""
    random, arrays, rows = np.random.default_rng(0), [], []
    for number in range(60):
        stalled = number % 4 == 0
        clip = random.integers(0, 120, (4 + number % 6, 16, 16), dtype=np.uint8)
        clip[:, 5:11, 5:11] += np.uint8(100 * stalled)
        about = {"spacing": [2.0, 0.5, 0.5], "interval": 0.05 if number % 2 else 0.1}
        arrays.append((clip, about))
        label = "stalled" if stalled else "flowing"
        rows.append({"filename": f"{number}.npy", "label": label, "group": f"mouse {number // 5}"})
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    prepare_arrays(
        read_manifest(folder / "clips.csv", naming=Naming(positive=("stalled",))),
        arrays,
        folder / "store",
        shard_clips=16,
    )
    return folder / "store"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, predicted and evaluated; not to be changed."""
    folder = tmp_path_factory.mktemp("card")
    out = folder / "run"
    more = ("train.epochs=2", "snapshots.at=[1, 2]", "optim.lr=1e-3", "clip.max_frames=6")
    train(load_config(None, overrides(described_store(folder), out, *more)))
    said("predict", out, "--prior", "0.1")
    said("evaluate", out)
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def card_of(run: Path, out: Path, **how: Any) -> ModelCard:
    export_run(run, out, **how)
    card = ModelCard.model_validate_json(out.with_suffix(".json").read_text())
    assert out.with_suffix(".md").read_text() == as_markdown(card)
    return card


def test_every_number_is_that_of_the_runs_files(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    card = card_of(run, out)
    facts = export_run(run, tmp_path / "again")
    record, evaluation = read_record(run), json.loads((run / EVALUATION).read_text())
    calibration = json.loads((run / "calibration.json").read_text())
    assert (card.file, card.crc32c, card.dist_train) == (
        "model.safetensors", stored_checksum(out), __version__,
    )  # fmt: skip
    assert card.model.parameters == record["parameters"]
    assert (card.model.steps, card.model.networks) == (facts["steps"], 2)
    assert card.model.classes == ["flowing", "stalled"]
    assert card.model.trained == record["sessions"][-1]["started"]
    assert card.decision.threshold == facts["threshold"]
    assert card.decision.prior == calibration["prior"] == 0.1
    e = card.evaluation
    assert e is not None
    assert (e.split, e.clips, e.threshold) == ("test", evaluation["clips"], evaluation["threshold"])
    for name in ("mcc", "auc", "ap", "accuracy", "f1", "precision", "recall"):
        assert e.metrics[name].value == evaluation[name]
    for name in ("mcc", "auc"):
        ci95 = e.metrics[name].ci95
        assert ci95 is not None
        assert list(ci95) == evaluation[f"{name}_ci95"]
    for name in ("log_loss", "brier", "ece"):
        assert e.metrics[name].value == evaluation["calibrated"][name]


def test_the_data_are_those_of_the_store(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path / "model.safetensors")
    store, splits = Store(run.parent / "store"), pd.read_csv(run / "splits.csv")
    data = card.data
    assert (data.store, data.content, data.clips) == ("store", store.content, 60)
    assert data.split_by == "folds"
    assert data.by_split == {
        split: {
            name: int(((splits["split"] == split) & (splits["label"] == label)).sum())
            for label, name in enumerate(["flowing", "stalled"])
        }
        for split in ("train", "val", "test")
    }
    frame = store.table.frame().assign(split=splits["split"].to_numpy())
    groups = frame.groupby("split")["group"].nunique()
    assert data.groups == {name: groups[name] for name in ("train", "val", "test")}
    assert data.shared_groups == (frame.groupby("group")["split"].nunique() > 1).sum()
    assert data.frames is not None
    assert (data.frames.least, data.frames.most) == (4, 9)
    assert data.frames.median == frame["frames"].median()
    assert card.input.frame_rate is not None
    assert (card.input.frame_rate.least, card.input.frame_rate.most) == pytest.approx((10, 20))
    assert {axis: of.median for axis, of in card.input.spacing.items()} == {
        "z": 2.0, "y": 0.5, "x": 0.5,
    }  # fmt: skip
    assert (card.input.dtype, card.input.size, card.input.max_frames) == ("uint8", (16, 16), 6)


def test_its_limits_are_those_of_the_data(run: Path, tmp_path: Path) -> None:
    limits = "\n".join(card_of(run, tmp_path / "model.safetensors").limits)
    assert "Few clips were trained on: 27 flowing, 9 stalled." in limits
    assert "Few clips are evaluated: 9 flowing, 3 stalled." in limits
    assert "One training is evaluated, with fold 0 of 5 as test" in limits
    assert "groups have clips in more than one split" in limits
    assert "Clips had 4 to 9 (median 6.5) frames, cut to 6" in limits


def test_its_three_lines_use_the_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(run, tmp_path / "my model.safetensors")
    monkeypatch.chdir(tmp_path)
    store, table = (
        Store(run.parent / "store"),
        pd.read_csv(run / "predictions.csv", dtype={"key": str}),
    )
    row = table[table["frames"] <= 6].iloc[0]
    clip = store.read(store.clip_of(row["key"]))
    known: dict[str, Any] = {"volumes": torch.from_numpy(clip.copy())[None, None]}
    assert len(card.use) == 3
    exec("\n".join(card.use), known)
    assert known["probability"] == pytest.approx([row["calibrated"]], rel=1e-4)


class LaterEvaluation(Evaluation):
    """Fields of later versions."""

    intervals: dict[str, tuple[float, float]]
    choice: str
    resampled: str
    worst: tuple[dict[str, Any], ...]


def test_further_fields_of_an_evaluation_are_taken(run: Path) -> None:
    said_there = json.loads((run / EVALUATION).read_text())
    further = {
        "intervals": {"ap": (0.5, 0.75), "brier": (0.125, 0.25)},
        "choice": "cost 5:1",
        "resampled": "groups",
        "worst": [{"column": "site", "value": "b", "clips": 20, "mcc": 0.25}],
    }
    found = evaluated(LaterEvaluation.model_validate(said_there | further))
    assert (found.metrics["ap"].ci95, found.metrics["brier"].ci95) == ((0.5, 0.75), (0.125, 0.25))
    assert (found.resampled, found.threshold_rule) == ("groups", "cost 5:1, fitted on val")
    assert found.worst == further["worst"]


def test_without_an_evaluation_of_these_weights_it_has_no_metrics(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "model.safetensors"
    assert card_of(copy, out, step=5).evaluation is None
    assert "There is no evaluation of these weights." in out.with_suffix(".md").read_text()
    # Of other predictions than those that are there.
    text = (copy / EVALUATION).read_text()
    changed = json.loads(text)
    changed["auc"] -= 0.01
    (copy / EVALUATION).write_text(json.dumps(changed))
    assert card_of(copy, out).evaluation is None
    assert "it is of other predictions or snapshots. Evaluate again" in caplog.text
    (copy / EVALUATION).write_text(text[:-9])
    assert card_of(copy, out).evaluation is None
    assert "is not in the model card: this is not an evaluation" in caplog.text
    (copy / EVALUATION).write_text(text)
    assert card_of(copy, out).evaluation is not None
    (copy / EVALUATION).unlink()
    card = card_of(copy, out)
    assert card.evaluation is None
    assert "Nothing is known of its errors" in card.limits[0]


def test_a_run_without_its_store_is_exported_and_the_card_says_so(
    copy: Path, tmp_path: Path
) -> None:
    trained_so(copy, "store=/nowhere")
    record = read_record(copy)
    _write_record(copy, record | {"store": record["store"] | {"path": "/nowhere"}})
    card = card_of(copy, tmp_path / "model.safetensors")
    assert (card.data.by_split, card.data.frames, card.data.clips) == ({}, None, 60)
    assert card.model.classes == ["flowing", "stalled"]
    assert any("the store that the run was trained on is not there" in s for s in card.limits)
    assert card.evaluation is not None


def test_a_card_replaces_only_a_card(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    for name, content in (("model.md", "# My notes\n"), ("model.json", '{"mine": 1}')):
        (tmp_path / name).write_text(content)
        assert "is no model card, and the card of the export would" in fails(
            "export", run, "--out", out
        )
        assert (tmp_path / name).read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    card_of(run, out)
    assert card_of(run, out, step=5).model.steps == [5]
    told = fails("export", run, "--out", out.with_suffix(""))
    assert "model.json: is the model card of model.safetensors" in told
    export_run(run, tmp_path / "net-0.1", step=5)
    export_run(run, tmp_path / "net-0.2", step=9)
    assert (tmp_path / "net-0.1.json").read_text() != (tmp_path / "net-0.2.json").read_text()
    with pytest.raises(RunError, match=r"model.json: the model card of the export has this name"):
        export_run(run, out, onnx=tmp_path / "model.json")
    with pytest.raises(RunError, match=r"the run itself keeps its predictions.json"):
        export_run(run, run / "predictions.safetensors")
    (tmp_path / "link.md").symlink_to("/dev/null")
    with pytest.raises(FileError, match=r"link.md: is a device"):
        export_run(run, tmp_path / "link.safetensors")


def test_names_in_it_are_no_markup(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path / "model.safetensors")
    named = card.model.model_copy(update={"classes": ["<b>|x", "a_b*\n# c"]})
    text = as_markdown(card.model_copy(update={"model": named}))
    assert r"binary: &lt;b>\|x, a\_b\*\\n# c |" in text
    # A file of this version is read back as it was written.
    assert load_exported(tmp_path / "model.safetensors").facts["steps"] == card.model.steps
