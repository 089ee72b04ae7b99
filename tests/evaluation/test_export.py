"""A run's model as one file: the same logits as the run's own model, whoever computes them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from helpers import contents, run_well, said, tiny_config, tiny_store, trained_so
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.special import expit
from torch import Tensor

from dist_train.checkpoint.format import load_checkpoint
from dist_train.data.augment.resize import resize
from dist_train.data.store.reader import Store
from dist_train.errors import CheckpointError, FileError, ModelError, RunError
from dist_train.evaluation.evaluate import evaluate
from dist_train.evaluation.export import PREPROCESSING, export_run
from dist_train.evaluation.exported import load_exported
from dist_train.evaluation.predict import predict
from dist_train.models.registry import MODELS
from dist_train.models.resnet3d import BLOCKS, Bottleneck
from dist_train.run.folder import OWN
from dist_train.run.model import make_model, model_metadata
from dist_train.run.record import _write_record, open_run, read_record
from dist_train.run.snapshots import load_snapshot, save_snapshot
from dist_train.training.train import train

SIDE = 14
# Clips of several depths in one batch, without padding, and alone; a single frame.
BATCHES = [([9, 4, 1], 9), ([5, 5], 5), ([12], 12), ([3], 8), ([1], 1)]


#: A ResNet-50 of two blocks, coarse in depth: one has the stride of its layer, and one has none.
MODEL = (
    *("model.name=resnet3d-50", "model.stem_pool=true", "model.stem_stride=[2, 2, 2]"),
    "model.dropout=0.3",
    # Unlike the clips in the store, which are of 8 frames of 16x16.
    f"clip.size=[{SIDE}, {SIDE}]",
    "clip.max_frames=6",
)


@pytest.fixture(scope="module", autouse=True)
def few_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, 50, (Bottleneck, (1, 1, 0, 0)))
        yield


@pytest.fixture(scope="module")
def run(few_blocks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with snapshots of steps 6 and 12, and predictions; not to be changed."""
    folder = tmp_path_factory.mktemp("export")
    store, out = tiny_store(folder / "store"), folder / "run"
    # A low rate, so that the probabilities are not all near 0 and 1.
    settings = ("train.epochs=2", "snapshots.at=[1, 2]", "optim.lr=1e-3", *MODEL)
    train(tiny_config(store, out, *settings))
    predict(out, prior=0.1)
    return out


@pytest.fixture(scope="module")
def exported(run: Path) -> tuple[Path, Path]:
    """Both files, by the command."""
    out, graph = run.parent / "new" / "model.safetensors", run.parent / "model.onnx"
    told = said("export", run, "--out", out, "--onnx", graph)
    lines = [f"snapshots of step 6, 12 in {file}" for file in (out, graph)]
    assert told.splitlines() == [*lines, f"model card in {out.with_suffix('.md')}"]
    onnx.checker.check_model(str(graph), full_check=True)
    return out, graph


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def batch_of(frames: list[int], depth: int) -> tuple[Tensor, Tensor]:
    """Clips of 0 to 1, with NaN in padded frames."""
    volumes = torch.rand(len(frames), 1, depth, SIDE, SIDE)
    for volume, real in zip(volumes, frames, strict=True):
        volume[:, real:] = float("nan")
    return volumes, torch.tensor(frames)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "depth"), BATCHES, ids=str)
def test_both_files_give_the_logits_of_the_snapshots(
    run: Path, exported: tuple[Path, Path], frames: list[int], depth: int
) -> None:
    volumes, lengths = batch_of(frames, depth)
    model = make_model(open_run(run)).eval()
    columns = []
    with torch.no_grad():
        for step in (6, 12):
            model.load_state_dict(load_file(run / "snapshots" / f"step-{step}.safetensors"))
            columns.append(model(volumes, lengths).numpy())
        by_torch = [t.numpy() for t in load_exported(exported[0]).model(volumes, lengths)]
    session = onnxruntime.InferenceSession(exported[1], providers=["CPUExecutionProvider"])
    inputs = {"volumes": volumes.numpy(), "frames": lengths.numpy()}
    by_onnx = session.run(["probability", "logits"], inputs)
    expected = np.stack(columns, axis=1)
    for probability, logits in (by_torch, by_onnx):
        assert probability.dtype == logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(probability, expit(expected).mean(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_both_files_say_what_they_are(run: Path, exported: tuple[Path, Path]) -> None:
    expected: dict[str, Any] = {
        "step": 12,
        "steps": [6, 12],
        "from": "snapshots",
        "networks": ["step-6/", "step-12/"],
        "model": model_metadata(open_run(run)),
        "precision": "fp32",
        "clip": {"size": [SIDE, SIDE], "max_frames": 6},
        "store": read_record(run)["store"]["content"],
        "data": open_run(run).model_dump(
            mode="json", include={"seed", "select", "split"}, exclude={"select": {"share"}}
        ),
        "preprocessing": PREPROCESSING,
        "positive_rate": {"train_batches": 0.25, "natural": 0.3},
        "calibration": json.loads((run / "calibration.json").read_text()),
        "threshold": evaluate(run / "predictions.csv").threshold,
    }
    with safe_open(exported[0], "pt") as file:
        found = json.loads(file.metadata()["facts"])
    crc = found["crc32c"]
    assert found == expected | {"crc32c": crc}
    (facts,) = [p.value for p in onnx.load(exported[1]).metadata_props if p.key == "facts"]
    assert json.loads(facts) == expected | {"crc32c": crc}


@pytest.mark.slow
def test_a_file_alone_gives_the_predictions(
    run: Path, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """By ``load_exported``, and by ONNX in a process that does not import this package."""
    table = pd.read_csv(run / "predictions.csv", index_col="key")
    assert table["probability"].std() > 0.01
    store = Store(open_run(run).store)
    clips = {key: store.read(store.clip_of(key)) for key in table.index}
    model = load_exported(exported[0])
    for key, clip in clips.items():
        cut = resize(clip[1:7], (SIDE, SIDE))
        probability = model.probability(torch.from_numpy(cut.copy())[None, None])
        assert probability[0] == pytest.approx(table["probability"][key], rel=1e-4)
        assert model.calibrated(probability) == pytest.approx(table["calibrated"][key], rel=1e-4)
    shutil.copy(exported[1], tmp_path)
    np.savez(tmp_path / "clips.npz", **clips)
    found = json.loads(run_well([sys.executable, "-c", BY_ONNX, str(tmp_path)]))
    by_onnx = pd.DataFrame.from_dict(found, orient="index")
    for column in ("probability", "calibrated"):
        np.testing.assert_allclose(by_onnx[column], table[column], rtol=1e-4, atol=1e-6)
    submission = pd.read_csv(run / "submission.csv").set_index("filename")["stalled"]
    test = table["split"] == "test"
    assert by_onnx["called"][test].tolist() == submission[table["filename"][test]].tolist()


BY_ONNX = """
import json, sys, cv2, numpy as np, onnx, onnxruntime
folder = sys.argv[1]
file = f"{folder}/model.onnx"
facts = json.loads({p.key: p.value for p in onnx.load(file).metadata_props}["facts"])
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
(height, width), most = facts["clip"]["size"], facts["clip"]["max_frames"]
how = facts["calibration"]
def moved(p, before, after):
    a, b = p * after / before, (1 - p) * (1 - after) / (1 - before)
    return a / (a + b)
found = {}
for key, clip in np.load(f"{folder}/clips.npz").items():
    first = max(0, len(clip) - most) // 2
    clip = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
            for frame in clip[first : first + most]]
    volumes = np.stack(clip)[None, None].astype(np.float32) / 255
    (p,), _ = session.run(None, {"volumes": volumes, "frames": np.array([len(clip)])})
    p = float(p)
    assert how["method"] == "none"
    calibrated = moved(p, how["batches_share"], how["prior"])
    found[key] = {"probability": p, "calibrated": calibrated,
                  "called": int(calibrated > facts["threshold"])}
print(json.dumps(found))
"""


def test_one_name_for_both_files_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(RunError, match=r"have the same name. Give --out and --onnx different"):
        export_run(run, out, onnx=tmp_path / "." / ".." / tmp_path.name / "model")
    assert not out.exists()


def test_predictions_of_other_snapshots_do_not_calibrate(copy: Path, tmp_path: Path) -> None:
    (copy / "snapshots" / "step-6.safetensors").unlink()
    with pytest.raises(RunError, match="predictions are of other snapshots"):
        export_run(copy, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_calibration_of_other_weights_or_predictions_is_not_exported(
    copy: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "file", copy / "calibration.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"prior": 0.2}))
    with pytest.raises(RunError, match="calibration of other predictions"):
        export_run(copy, out)
    file.write_text(content)
    # Other weights under the same name.
    path = copy / "snapshots" / "step-6.safetensors"
    weights, facts = load_snapshot(path)
    weights["head.bias"] = weights["head.bias"] + 1
    save_snapshot(path, weights, facts)
    with pytest.raises(RunError, match=r"that the run does not have now \(step-6\)"):
        export_run(copy, out)
    assert not out.exists()


@pytest.mark.parametrize("on_all", [False, True])
def test_without_predictions_there_is_no_calibration_and_it_is_told(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, on_all: bool
) -> None:
    for name in ("predictions.csv", "calibration.json"):
        (copy / name).unlink()
    if on_all:
        trained_so(copy, "split.train_on_all=true", "checkpoint.accept_other_order=true")
    facts = export_run(copy, tmp_path / "file")
    assert (facts["calibration"], facts["threshold"]) == (None, None)
    assert ("predict --store" if on_all else "run 'dist-train predict' before") in caplog.text
    with pytest.raises(RunError, match="has no calibration"):
        load_exported(tmp_path / "file").calibrated(np.array([0.5]))


def test_what_is_no_export_is_refused(run: Path, tmp_path: Path) -> None:
    snapshot = run / "snapshots" / "step-6.safetensors"
    (tmp_path / "torn").write_bytes(snapshot.read_bytes()[:1000])
    for path in (snapshot, tmp_path / "torn", tmp_path / "nothing"):
        with pytest.raises(RunError, match=f"^{path}: this is no model that 'dist-train export'"):
            load_exported(path)


def test_a_step_can_be_chosen(run: Path, tmp_path: Path) -> None:
    assert export_run(run, tmp_path / "6", step=6)["from"] == "snapshot"
    weights = load_file(tmp_path / "6")
    snapshot = load_file(run / "snapshots" / "step-6.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in snapshot.items())


@pytest.mark.parametrize("step", [None, 8], ids=["newest", "step 8"])
def test_a_run_without_snapshots_gives_its_checkpoint(
    run: Path, copy: Path, tmp_path: Path, step: int | None
) -> None:
    """With fresh statistics, also from a store that was moved: none are kept within an epoch."""
    shutil.rmtree(copy / "snapshots")
    trained_so(copy, "store=/nowhere")
    record = read_record(copy)
    _write_record(copy, record | {"store": record["store"] | {"path": "/nowhere"}})
    facts = export_run(copy, tmp_path / "file", step=step, store_path=run.parent / "store")
    assert (facts["step"], facts["from"]) == (step or 12, "checkpoint")
    tensors, _ = load_checkpoint(run / "checkpoints" / f"step-{step or 12}")
    weights = load_file(tmp_path / "file")
    assert weights.keys() == make_model(open_run(run)).state_dict().keys()
    renewed = {name for name in weights if not torch.equal(weights[name], tensors[f"model/{name}"])}
    assert renewed == {name for name in weights if name.endswith(("running_mean", "running_var"))}


def test_a_checkpoint_of_a_run_with_an_average_gives_the_average(run: Path, tmp_path: Path) -> None:
    """As its snapshot would, and not the weights that training goes on with."""
    out = tmp_path / "run"
    train(
        tiny_config(
            run.parent / "store", out, "train.epochs=1", "snapshots.at=[1]", "optim.ema=0.9"
        )
    )
    snapshot = load_file(out / "snapshots" / "step-6.safetensors")
    shutil.rmtree(out / "snapshots")
    assert export_run(out, tmp_path / "file")["from"] == "checkpoint"
    weights = load_file(tmp_path / "file")
    assert weights.keys() == snapshot.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in snapshot.items())
    tensors, _ = load_checkpoint(out / "checkpoints" / "step-6")
    assert not torch.equal(weights["head.weight"], tensors["model/head.weight"])


def test_weights_that_are_not_there(run: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        export_run(run, tmp_path / "file", step=7)
    assert str(caught.value) == (
        f"{run}: the run has no weights of step 7. There are those of 6, 8, 12."
    )
    for folder in ("snapshots", "checkpoints"):
        shutil.rmtree(copy / folder)
    with pytest.raises(RunError, match="the run has no weights yet"):
        export_run(copy, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_weights_of_another_model(copy: Path, tmp_path: Path) -> None:
    trained_so(copy, "model.width=8")
    with pytest.raises(RunError, match=r"step-6.safetensors: the snapshot does not fit the run"):
        export_run(copy, tmp_path / "file")
    shutil.rmtree(copy / "snapshots")
    with pytest.raises(RunError, match=r"step-12: the weights do not fit the run"):
        export_run(copy, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_damaged_checkpoints_are_told(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "snapshots")
    for share in (copy / "checkpoints").glob("step-*/rank-*"):
        share.write_bytes(share.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        export_run(copy, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: the file is damaged"):
        export_run(copy, tmp_path / "file", step=8)
    assert not (tmp_path / "file").exists()


def test_without_onnx_it_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.evaluation.onnx_model.NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(RunError, match=r"ONNX needs no_such_package. Run pip install"):
        export_run(run, tmp_path / "file", onnx=tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_a_network_without_an_onnx_form(run: Path, tmp_path: Path) -> None:
    name = "resnet3d-50"
    without = replace(MODELS[name], cannot={"onnx": "has no ONNX form"})
    with (
        mock.patch.dict(MODELS, {name: without}),
        pytest.raises(ModelError, match="--onnx: resnet3d-50 has no ONNX form"),
    ):
        export_run(run, tmp_path / "file", onnx=tmp_path / "graph")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["out", "onnx"])
def test_only_a_plain_file_outside_of_the_run_is_replaced(
    run: Path, tmp_path: Path, option: str
) -> None:
    """As root, ``--out /dev/null`` would replace the device."""
    before = contents(run)
    paths = {"out": tmp_path / "model.safetensors"}
    for own in OWN:
        name = f"{own}/new" if (run / own).is_dir() else own
        with pytest.raises(RunError, match=f"{name}: the run itself keeps its {own}"):
            export_run(run, **paths | {option: run / name})
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(FileError, match="device: is a device, and would be replaced"):
        export_run(run, **paths | {option: tmp_path / "device"})
    assert [path.name for path in tmp_path.iterdir()] == ["device"]
    assert contents(run) == before
