"""A run's model as one file: the same logits as the run's own model, whoever computes them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from helpers import contents, refused, run_well, said, tiny_config, tiny_store, trained_so
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.special import expit
from torch import Tensor, nn

from dist_train.checkpoint.format import load_checkpoint
from dist_train.data.store.reader import Store
from dist_train.errors import CheckpointError, RunError
from dist_train.evaluation.evaluate import evaluate
from dist_train.evaluation.export import PREPROCESSING, export_run, onnx_bytes
from dist_train.evaluation.exported import load_exported
from dist_train.evaluation.predict import predict
from dist_train.models.resnet3d import BLOCKS, Bottleneck, ResNet3D
from dist_train.run.model import make_model, model_metadata
from dist_train.run.record import open_run, read_record
from dist_train.run.snapshots import load_snapshot, save_snapshot
from dist_train.training.train import train

SIDE = 14
# Clips of several depths in one batch, without padding, and alone; a single frame.
BATCHES = [([9, 4, 1], 9), ([5, 5], 5), ([12], 12), ([3], 8), ([1], 1)]
each_batch = pytest.mark.parametrize(("frames", "depth"), BATCHES, ids=str)


#: A ResNet-50 of one block a layer, coarse in depth: it has all that a network can have.
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
        patch.setitem(BLOCKS, 50, (Bottleneck, (1, 1, 1, 1)))
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
    assert told == "".join(f"snapshots of step 6, 12 in {file}\n" for file in (out, graph))
    return out, graph


def model_of(run: Path, weights: dict[str, Tensor]) -> nn.Module:
    model = make_model(open_run(run))
    model.load_state_dict(weights)
    return model.eval()


def batch(frames: list[int], depth: int) -> tuple[Tensor, Tensor]:
    """Clips of 0 to 1, and whatever there may be in padded frames."""
    generator = torch.Generator().manual_seed(depth)
    volumes = torch.rand(len(frames), 1, depth, SIDE, SIDE, generator=generator)
    for volume, real in zip(volumes, frames, strict=True):
        volume[:, real:] = float("nan")
    return volumes, torch.tensor(frames)


@torch.no_grad()
def logits_of(model: nn.Module, frames: list[int], depth: int) -> np.ndarray:
    volumes, lengths = batch(frames, depth)
    logits: np.ndarray = model(volumes, lengths).numpy()
    return logits


def by_onnx(graph: bytes, frames: list[int], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability [B] and logits [B, snapshots]."""
    volumes, lengths = batch(frames, depth)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    inputs = {"volumes": volumes.numpy(), "frames": lengths.numpy()}
    probability, logits = session.run(["probability", "logits"], inputs)
    return probability, logits


def of_snapshots(run: Path, frames: list[int], depth: int) -> np.ndarray:
    """Logits by each snapshot, [B, 2]."""
    files = (run / "snapshots" / f"step-{step}.safetensors" for step in (6, 12))
    columns = [logits_of(model_of(run, load_file(file)), frames, depth) for file in files]
    return np.stack(columns, axis=1)


@pytest.mark.slow
@each_batch
def test_the_safetensors_file_gives_the_logits_of_the_snapshots(
    run: Path, exported: tuple[Path, Path], frames: list[int], depth: int
) -> None:
    with torch.no_grad():
        probability, logits = load_exported(exported[0]).model(*batch(frames, depth))
    assert np.isfinite(logits.numpy()).all()
    # The run keeps its weights channels last, and so rounds in other places.
    expected = of_snapshots(run, frames, depth)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(probability.numpy(), expit(logits.numpy()).mean(1), rtol=1e-5)


@pytest.mark.slow
@each_batch
def test_the_onnx_file_gives_the_same_logits(
    run: Path, exported: tuple[Path, Path], frames: list[int], depth: int
) -> None:
    onnx.checker.check_model(str(exported[1]), full_check=True)
    expected = of_snapshots(run, frames, depth)
    probability, logits = by_onnx(exported[1].read_bytes(), frames, depth)
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
        "data": open_run(run).model_dump(mode="json", include={"seed", "select", "split"}),
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
    """In a new process, without the run: by the package, and by ONNX with nothing of it."""
    table = pd.read_csv(run / "predictions.csv")
    assert table["probability"].std() > 0.01
    clips = {
        key: store.read(store.clip_of(key)) for store in [Store(open_run(run).store)]
        for key in table["key"]
    }  # fmt: skip
    np.savez(tmp_path / "clips.npz", **clips)
    for file in exported:
        shutil.copy(file, tmp_path)
    for program in (BY_PACKAGE, BY_ONNX):
        found = json.loads(run_well([sys.executable, "-c", program, str(tmp_path)]))
        assert list(found) == table["key"].tolist()
        for column in ("probability", "calibrated"):
            values = [clip[column] for clip in found.values()]
            np.testing.assert_allclose(values, table[column], rtol=1e-4, atol=1e-6)
        called = pd.Series([clip["called"] for clip in found.values()])
        submission = pd.read_csv(run / "submission.csv").set_index("filename")["stalled"]
        test = table["split"] == "test"
        assert called[test].tolist() == submission[table["filename"][test]].tolist()


BY_PACKAGE = """
import json, sys, numpy as np, torch
from dist_train.data.augment.resize import resize
from dist_train.evaluation.exported import load_exported
from dist_train.models.resnet3d import BLOCKS, Bottleneck
BLOCKS[50] = (Bottleneck, (1, 1, 1, 1))  # as this file's other tests
folder = sys.argv[1]
model = load_exported(f"{folder}/model.safetensors")
found = {}
for key, clip in np.load(f"{folder}/clips.npz").items():
    most = model.facts["clip"]["max_frames"]
    first = max(0, len(clip) - most) // 2
    clip = resize(clip[first : first + most], tuple(model.facts["clip"]["size"]))
    probability = model.probability(torch.from_numpy(clip.copy())[None, None])
    calibrated = model.calibrated(probability)
    found[key] = {"probability": probability[0], "calibrated": calibrated[0],
                  "called": int(calibrated[0] > model.facts["threshold"])}
print(json.dumps(found))
"""
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


def test_predictions_of_other_snapshots_do_not_calibrate(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "snapshots" / "step-6.safetensors").unlink()
    with pytest.raises(RunError, match="predictions are of other snapshots"):
        export_run(tmp_path / "run", tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prior": 0.9}, "calibration of other predictions"),
        ({"prior": 2.0}, "not a calibration"),
        ({"method": "isotonic", "points": []}, "not a calibration"),
        (None, "not a calibration"),
    ],
)
def test_a_calibration_that_was_edited_is_refused(
    run: Path, tmp_path: Path, changes: dict[str, Any] | None, told: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    predict(copy)
    path = copy / "calibration.json"
    content = json.loads(path.read_text())
    path.unlink()
    if changes is None:
        path.mkdir()
    else:
        path.write_text(json.dumps(content | changes))
    assert told in refused("evaluate", copy)
    assert told in refused("export", copy, "--out", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_calibration_of_other_weights_or_predictions_is_not_exported(
    run: Path, tmp_path: Path
) -> None:
    copy, out = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "file"
    file = copy / "calibration.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"prior": 0.2}))
    with pytest.raises(RunError, match="calibration of other predictions"):
        export_run(copy, out)
    file.write_text(json.dumps(content))
    # Other weights under the same name.
    path = copy / "snapshots" / "step-6.safetensors"
    weights, facts, _ = load_snapshot(path)
    weights["head.bias"] = weights["head.bias"] + 1
    save_snapshot(path, weights, facts)
    with pytest.raises(RunError, match=r"that the run does not have now \(step-6\)"):
        export_run(copy, out)
    assert not out.exists()


def test_before_predictions_there_is_no_calibration_and_it_is_told(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in ("predictions.csv", "calibration.json"):
        (tmp_path / "run" / name).unlink()
    facts = export_run(tmp_path / "run", tmp_path / "file")
    assert (facts["calibration"], facts["threshold"]) == (None, None)
    assert "run 'dist-train predict' before" in caplog.text
    with pytest.raises(RunError, match="has no calibration"):
        load_exported(tmp_path / "file").calibrated(np.array([0.5]))


def test_what_is_no_export_is_refused(run: Path, tmp_path: Path) -> None:
    snapshot = run / "snapshots" / "step-6.safetensors"
    (tmp_path / "torn").write_bytes(snapshot.read_bytes()[:1000])
    for path in (snapshot, tmp_path / "torn", tmp_path / "nothing"):
        with pytest.raises(RunError, match=f"^{path}: this is no model that 'dist-train export'"):
            load_exported(path)


@pytest.mark.soak
def test_basic_blocks_without_pooling_as_onnx() -> None:
    torch.manual_seed(0)
    model = ResNet3D(10, width=4, stem_pool=False)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm3d):
            for tensor in (norm.bias, norm.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
    graph = onnx_bytes([model.eval()], (SIDE, SIDE), {})
    for frames, depth in BATCHES:
        expected = logits_of(model, frames, depth)
        _, logits = by_onnx(graph, frames, depth)
        np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_step_can_be_chosen(run: Path, tmp_path: Path) -> None:
    assert export_run(run, tmp_path / "6", step=6)["from"] == "snapshot"
    weights = load_file(tmp_path / "6")
    snapshot = load_file(run / "snapshots" / "step-6.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in snapshot.items())


@pytest.mark.parametrize("step", [None, 8], ids=["newest", "step 8"])
def test_a_run_without_snapshots_gives_its_checkpoint(
    run: Path, tmp_path: Path, step: int | None
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    facts = export_run(tmp_path / "run", tmp_path / "file", step=step)
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


def test_a_step_that_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        export_run(run, tmp_path / "file", step=7)
    assert str(caught.value) == (
        f"{run}: the run has no weights of step 7. There are those of 6, 8, 12."
    )
    assert not list(tmp_path.iterdir())


def test_a_run_that_saved_nothing_yet(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "run")
    with pytest.raises(RunError, match="the run has no weights yet"):
        export_run(tmp_path / "run", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^{tmp_path}: there is no run here"):
        export_run(tmp_path, tmp_path / "file")


def test_weights_of_another_model(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    trained_so(copy, "model.width=8")
    with pytest.raises(RunError, match=r"step-6.safetensors: the snapshot does not fit the run"):
        export_run(copy, tmp_path / "file")
    shutil.rmtree(copy / "snapshots")
    with pytest.raises(RunError, match=r"step-12: the checkpoint does not fit the run"):
        export_run(copy, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_damaged_file_is_told(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    snapshot = copy / "snapshots" / "step-12.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-10])
    with pytest.raises(RunError, match=f"^{snapshot}: the snapshot cannot be used"):
        export_run(copy, tmp_path / "file")
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
    monkeypatch.setattr("dist_train.evaluation.export.NEEDED_FOR_ONNX", ("onnx", "no_such_package"))
    with pytest.raises(RunError, match=r"ONNX needs no_such_package. Run pip install"):
        export_run(run, tmp_path / "file", onnx=tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_a_network_without_an_onnx_form() -> None:
    with pytest.raises(RunError, match=r"Linear cannot be written as ONNX. Leave out --onnx"):
        onnx_bytes([nn.Linear(1, 1)], (SIDE, SIDE), {})


@pytest.mark.parametrize("option", ["--out", "--onnx"])
@pytest.mark.parametrize(
    "name", ["snapshots/step-7.safetensors", "config.yaml", "checkpoints/step-4/rank-9", "run.json"]
)
def test_no_file_of_the_run_is_replaced_or_added(
    run: Path, tmp_path: Path, name: str, option: str
) -> None:
    before = contents(run)
    arguments = {"--out": tmp_path / "model.safetensors", option: run / name}
    line = refused("export", run, *(word for pair in arguments.items() for word in pair))
    assert f"{name}: the run itself keeps its {Path(name).parts[0]} there" in line
    assert contents(run) == before


@pytest.mark.parametrize("option", ["--out", "--onnx"])
def test_only_a_plain_file_is_replaced(run: Path, tmp_path: Path, option: str) -> None:
    """Before any work: as root, `--out /dev/null` would replace the device for all."""
    (tmp_path / "device").symlink_to("/dev/null")
    arguments = {"--out": tmp_path / "model.safetensors", option: tmp_path / "device"}
    line = refused("export", run, *(word for pair in arguments.items() for word in pair))
    assert line.startswith(f"error: {tmp_path / 'device'}: is a device, and would be replaced")
    assert [path.name for path in tmp_path.iterdir()] == ["device"]
    assert (tmp_path / "device").is_symlink()
    assert "/dev/null: is a device" in refused("export", run, "--out", "/dev/null")
